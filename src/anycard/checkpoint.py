"""What `anycard.open` returns: a file's names, tensors and plain data, read when asked for."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO

from zlib_ng import zlib_ng

from anycard.arguments import refuse_odd
from anycard.collection import uncollected
from anycard.disk.source import Source, open_source
from anycard.errors import CheckpointError, FormatError, naming
from anycard.formats.index import Index
from anycard.formats.registry import read_index
from anycard.limits import DEFAULT, Limits
from anycard.names.choosing import canonical_names, pick
from anycard.names.contents import Contents, contents
from anycard.names.plain import Plain
from anycard.names.stored import Found, StateDict, find_state_dicts
from anycard.needs_torch import explained
from anycard.progress import Progress
from anycard.tensors import DTYPES, TensorInfo
from anycard.warning import warn

_LISTED = 10_000  # elements of a numpy array beside the weights that are spelt out
_VIEWS = 4  # so often may each stored byte be made


class Checkpoint:
    """An open checkpoint. Use it in a `with` block, or call `close()`.

    Attributes:
        format: How the bytes lie on disk ("torch zip", "legacy stream", "safetensors").
        path: What it was opened by, for people.
    """

    def __init__(self, source: Source, index: Index, limits: Limits = DEFAULT) -> None:
        self._source = source
        self._index = index
        self._limits = limits
        self.path = source.name
        self.format = index.format

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.format}, {len(self.tensors)} tensors)"

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()
        self._index.source.close()

    @property
    def tree(self) -> Any:
        """The file's object as inert data: dicts, lists, plain values, `TensorInfo`, stubs."""
        return self._index.tree

    @property
    def metadata(self) -> dict[str, Any]:
        """What the format says beside the tensors (safetensors' `__metadata__`, …)."""
        return dict(self._index.metadata)

    @property
    def marked(self) -> bool:
        """anycard wrote the file, and its names are canonical."""
        return self._index.mark is not None

    @property
    def mark(self) -> dict[str, Any]:
        """anycard's own record in the file: versions, wrapper state, ties."""
        return dict(self._index.mark or {})

    @property
    def records(self) -> dict[str, Any]:
        """A zip's records by name; empty in other formats."""
        return dict(self._index.records)

    @property
    def _contents(self) -> Contents:
        if isinstance(self._walked, FormatError):
            raise self._walked.with_traceback(None)
        return self._walked

    @cached_property
    def _walked(self) -> Contents | FormatError:
        """A refusal is kept as well: it comes after all the work that the limits allow."""
        try:
            with naming(self.path):
                return contents(self._index.tree, self._limits)
        except FormatError as error:
            return error

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its full stored path."""
        return self._contents.tensors

    @property
    def objects(self) -> dict[str, Any]:
        """Full path -> everything else, as plain data."""
        found = self._contents
        plain = Plain(sum(not Plain.is_leaf(value) for value in found.objects.values()), self._spelt)
        return {path: plain.spelt(value, found.above.get(path, ())) for path, value in found.objects.items()}

    def _spelt(self, info: TensorInfo) -> Any:
        return as_numpy(info, limits=self._limits).tolist() if info.numel <= _LISTED else info

    @property
    def state_dicts(self) -> list[StateDict]:
        """The state dicts in the file, by structure."""
        return self.found.dicts

    @cached_property
    def found(self) -> Found:
        """The state dicts in the file, and levels of several taken as one."""
        tensors = bool(self.tensors)  # an object without end is refused once, not at each of its levels
        tree = {**self._index.tree, **self.ties} if self.ties else self._index.tree
        with naming(self.path):
            return find_state_dicts(tree, tensors=tensors)

    @cached_property
    def ties(self) -> dict[str, TensorInfo]:
        """Second names of tied tensors that a safetensors file keeps in its metadata."""
        tree = self._index.tree
        if self.format not in ("safetensors", "sharded safetensors"):
            return {}
        told = self.marked or self.format == "sharded safetensors"  # an index is no place for notes of anyone's own
        pairs = [(name, kept) for name, kept in self._index.metadata.items() if isinstance(kept, str) and kept in tree]
        return {
            name: tree[kept]
            for name, kept in pairs
            if name not in tree and name != "format" and (told or _like_a_tie(name, kept))
        }

    def chosen(self, key: str | None = None) -> StateDict:
        """The one state dict that is meant; ChoiceError where none or several could be."""
        refuse_odd(key=key)
        tree = self._index.tree
        if key is None and not self.state_dicts and isinstance(tree, Mapping) and not tree:
            return StateDict("", {})  # a module's that has no tensors
        return pick(self.state_dicts, key, self.path)

    @cached_property
    def wrappers(self) -> tuple[str, ...]:
        """Wrappers that the stored names or classes show, outermost first."""
        found: dict[str, None] = {}
        for held in self.state_dicts:
            found.update(dict.fromkeys(canonical_names(held, marked=self.marked)[1]))
        return tuple(found)

    def weights(self, key: str | None = None, *, canonical: bool = True) -> dict[str, TensorInfo]:
        """The one state dict that read, diff and fingerprint use: canonical name -> TensorInfo.

        Raises:
            ChoiceError: The file holds none or several, or none by that key.
        """
        found = self.chosen(key)
        if not found.tensors and found.canonical is not None:
            warn(f"{self.path}: no tensors are found in the model that it holds")
        if not canonical:
            return dict(found.tensors)
        names, _ = canonical_names(found, marked=self.marked)
        return {name: found.tensors[stored] for stored, name in names.items()}

    def numpy(self, name: str, *, raw: bool = False) -> Any:
        """One tensor as an array, read now; by full stored path or canonical name.

        Args:
            raw: Give unsigned integers of the element size, for any dtype.

        Raises:
            TypeError: numpy lacks the dtype and `ml_dtypes` is not installed.
        """
        return as_numpy(self._info(name), raw=raw, limits=self._limits)

    def torch(self, name: str) -> Any:
        """One tensor as a `torch.Tensor` on the CPU, read now."""
        try:
            from anycard.torch.reading import read_tensor
        except ModuleNotFoundError as error:
            raise explained(error, "Checkpoint.torch") from None
        return read_tensor(self._info(name), name, limits=self._limits)

    def _info(self, name: str) -> TensorInfo:
        if name in self.tensors:
            return self.tensors[name]
        found = self.weights() if len(self.state_dicts) == 1 else {}
        if name in found:
            return found[name]
        raise CheckpointError(f"{self.path} holds no tensor {name!r}", path=self.path, name=name)

    def fingerprint(self, key: str | None = None, *, progress: Progress = None) -> str:
        """`blake3:` and 64 hex digits: the same for the same weights in any format, any wrapper.

        Raises:
            FormatError: A file of ours says another fingerprint of itself: it is damaged.
        """
        from anycard.formats.safetensors import FINGERPRINT
        from anycard.operations.fingerprinting import fingerprint_of

        refuse_odd(key=key, progress=progress)
        with naming(self.path):
            found = fingerprint_of(self.weights(key), self._limits, progress=progress)
        told = self.metadata.get(FINGERPRINT) if key is None and self.marked else None
        if told is not None and told != found:
            raise FormatError("the file is damaged: it says another fingerprint of itself", path=self.path)
        return found


Checkpoint.__module__ = "anycard"


def open_checkpoint(
    file: str | os.PathLike[str] | BinaryIO, *, member: str | None = None, limits: Limits = DEFAULT
) -> Checkpoint:
    """Open a checkpoint of any format; only its index is read.

    Args:
        member: Which file, where this one holds checkpoints inside.

    Raises:
        FormatError: Damaged, or no checkpoint.
        ChoiceError: Several checkpoints are inside; or `member` names none, or the file is one itself.
        FileNotFoundError: There is no such file.
    """
    refuse_odd(member=member)
    source = open_source(file)
    try:
        with uncollected():
            return Checkpoint(source, read_index(source, limits, member), limits)
    except BaseException:
        source.close()
        raise


def _like_a_tie(name: str, kept: str) -> bool:
    """Two names of one parameter, as `safetensors.torch.save_model` writes them among anyone's own metadata.

    Nothing else tells them from a note that happens to name a tensor: a tied parameter is called the same in two
    modules, or has two names in one.
    """
    module, _, own = name.rpartition(".")
    kept_module, _, kept_own = kept.rpartition(".")
    return own == kept_own or (bool(module) and module == kept_module)


def tensor_bytes(info: TensorInfo, limits: Limits = DEFAULT) -> memoryview:
    """The tensor's elements in row-major, little-endian order, as one new buffer.

    Raises:
        FormatError: The bytes are not there, or more would be made than `limits.expanded_nbytes`.
    """
    import numpy as np

    array = as_numpy(info, raw=True, limits=limits)
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8).data) if flat.size else memoryview(b"")


def refuse_more_than_stored(infos: Collection[TensorInfo], limits: Limits) -> None:
    """Views that overlap or have strides of 0: what they come to is bounded together, as it is for each.

    A few views of the same bytes are usual: a flat parameter beside its parts.
    """
    infos = [info for info in infos if not info.storage.missing]
    stored = sum({id(info.storage): info.storage.nbytes for info in infos}.values())
    most = _VIEWS * stored + limits.expanded_nbytes
    claimed = sum(info.form.nbytes for info in infos)
    if claimed > most:
        claimed = sum({info.place: info.form.nbytes for info in infos}.values())
    if claimed > most:
        raise FormatError(f"tensors of {claimed:,} bytes are claimed from {stored:,} stored")


def span_bytes(info: TensorInfo) -> bytearray:
    """The stored bytes from the first element to the last, as they lie in the file."""
    storage = info.storage
    if storage.missing:
        raise FormatError(f"the bytes of storage {storage.key} cannot be read: {storage.missing}")
    if storage.data is not None:
        return bytearray(storage.data[info.start : info.start + info.span])
    buffer = bytearray(info.span)
    if buffer and storage.source is not None and info.offset is not None:
        storage.source.read_into(info.offset, memoryview(buffer))
        if storage.crc is not None and len(buffer) == storage.nbytes and zlib_ng.crc32(buffer) != storage.crc:
            raise FormatError(f"storage {storage.key} is damaged: its CRC-32 does not match", offset=storage.offset)
    return buffer


def as_numpy(info: TensorInfo, *, raw: bool = False, limits: Limits = DEFAULT) -> Any:
    """The tensor as a numpy array (see `Checkpoint.numpy`)."""
    import numpy as np

    row = DTYPES[info.dtype]
    if info.nbytes > max(limits.expanded_nbytes, info.storage.nbytes):
        raise FormatError(f"a tensor of {info.nbytes:,} bytes is claimed from {info.storage.nbytes:,} stored bytes")
    unit = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}[row.itemsize]
    flat = np.frombuffer(_native(span_bytes(info), info), dtype=unit)
    steps = tuple(step * row.itemsize for step in info.stride)
    bits = np.lib.stride_tricks.as_strided(flat, info.shape, steps) if flat.size else np.zeros(info.shape, unit)
    if info.conj or info.neg:
        bits = _resolved(np.ascontiguousarray(bits).reshape(info.shape), info)
    return bits if raw else _valued(bits, info.dtype)


def _native(data: bytearray, info: TensorInfo) -> bytearray:
    """Little-endian bytes, whatever the file has."""
    import numpy as np

    size = DTYPES[info.dtype].itemsize
    if DTYPES[info.dtype].kind == "complex":
        size //= 2
    if not info.storage.big_endian or size == 1:
        return data
    return bytearray(np.frombuffer(data, dtype=f">u{size}").astype(f"<u{size}").tobytes())


def _resolved(bits: Any, info: TensorInfo) -> Any:
    """Apply torch's lazy conjugate and negative bits, by flipping signs."""
    import numpy as np

    half = DTYPES[info.dtype].itemsize // (2 if DTYPES[info.dtype].kind == "complex" else 1)
    unit = np.dtype(f"u{half}")
    parts = bits.reshape(-1).view(unit).copy()
    sign = unit.type(1 << (8 * half - 1))
    if info.conj:
        parts[1::2] ^= sign
    if info.neg:
        parts ^= sign
    return parts.view(bits.dtype).reshape(bits.shape)


def _valued(bits: Any, dtype: str) -> Any:
    import numpy as np

    row = DTYPES[dtype]
    if row.numpy is not None:
        return np.ascontiguousarray(bits).view(row.numpy).reshape(bits.shape)
    try:
        import ml_dtypes

        return np.ascontiguousarray(bits).view(getattr(ml_dtypes, dtype)).reshape(bits.shape)
    except (ImportError, AttributeError):
        raise TypeError(f"numpy has no {dtype}: install ml_dtypes, or ask for the bits with raw=True") from None
