"""DCP (`torch.distributed.checkpoint`): a folder of `.metadata` and files of torch zips, one for each chunk.

Source: torch/distributed/checkpoint/metadata.py, filesystem.py, _nested_dict.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anycard.disk.folder import Folder, home_of, plain_parts
from anycard.disk.source import Source, WindowSource
from anycard.errors import FormatError
from anycard.formats.assembled import Chunk, Prover, assemble
from anycard.formats.dcp_packed import PackedBytes, Unpacker, unpacked_object, unread, why_not
from anycard.formats.index import Index
from anycard.formats.nested import nested
from anycard.formats.registry import read_file_index
from anycard.limits import Limits
from anycard.pickles.brief import brief
from anycard.pickles.composite import Composite
from anycard.pickles.machine import read_pickle
from anycard.pickles.stubs import Inert
from anycard.pickles.views import MOST_ELEMENTS, short
from anycard.tensors import DTYPES, Storage, TensorInfo, form_of

METADATA = ".metadata"
_MOST_INFLATED, _RATIO = 64 << 20, 100  # of all packed entries: bytes, or times what is stored
_Place = tuple[str, tuple[int, ...] | None]  # a name, and where its chunk begins


def is_part(source: Source) -> bool:
    """The file is of a DCP folder: `.metadata` is there, or beside it."""
    home = home_of(source)
    return source.name.replace("\\", "/").rpartition("/")[2] == METADATA or bool(home and home.has(METADATA))


def read_part(folder: Folder, source: Source, limits: Limits) -> Index:
    """The index of the folder that a file of it is in."""
    return read_index(folder, limits)


def read_index(folder: Folder, limits: Limits) -> Index:
    """The index of a DCP folder; every entry's range and every tensor's chunks proved.

    Raises:
        FormatError: Malformed; files that `.metadata` names are missing (all are named).
    """
    source = folder.open(METADATA)
    if source.size > limits.index_nbytes:
        raise FormatError(f"its metadata has {source.size:,} bytes", path=source.name, offset=0)
    data = source.read(0, source.size)
    try:
        held, _ = read_pickle(data, persistent_load=_refuse, limits=limits)
        state = _state(held, "Metadata")
        described = state.get("state_dict_metadata")
        if not isinstance(described, dict) or not all(isinstance(name, str) for name in described):
            raise FormatError("its metadata lists no tensors", offset=0)
        entries = _Entries(folder, state.get("storage_data"), limits, source.size)
        values = {name: _value(name, entry, entries, limits) for name, entry in described.items()}
        paths = state.get("planner_data")
        tree = nested(values, paths if isinstance(paths, dict) else {})
    except FormatError as error:
        error.path = error.path or source.name
        raise
    version = state.get("version")
    return Index("DCP", tree, folder, {"version": version} if isinstance(version, str) else {})


def _refuse(pid: Any) -> Any:
    raise FormatError("a persistent id, which DCP's metadata has none of")


def _state(stub: Any, name: str) -> Mapping[str, Any]:
    """The fields of one of DCP's dataclasses."""
    state = stub.state if isinstance(stub, Inert) and type(stub).name == name else None
    if not isinstance(state, dict):
        raise FormatError(f"DCP's metadata has something else in the place of a {name}", offset=0)
    return state


def _sizes(value: Any, limits: Limits) -> tuple[int, ...]:
    good = isinstance(value, (tuple, list)) and len(value) <= limits.rank
    if not good or any(type(v) is not int or not 0 <= v < MOST_ELEMENTS for v in value):
        raise FormatError("a size or an offset in DCP's metadata is none that torch can hold", offset=0)
    return tuple(value)


class _Entries:
    """What `storage_data` says of each chunk: file, offset, length. Each entry is read once."""

    def __init__(self, folder: Folder, held: Any, limits: Limits, nbytes: int) -> None:
        self.folder = folder
        self._chunks = 10_000 + nbytes // 8  # each takes some bytes, where it is not the same again and again
        self.prover = Prover()
        self._limits = limits
        self._infos: dict[_Place, Mapping[str, Any]] = {}
        self._inflated = self._stored = 0
        self._unpacker = Unpacker(folder.name, limits)
        folder.adopt(self._unpacker)
        if not isinstance(held, dict):
            raise FormatError("DCP's metadata does not say where its entries lie", offset=0)
        for key, value in held.items():
            index = _state(key, "MetadataIndex")
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str):
                raise FormatError("an entry of DCP's metadata has no name", offset=0)
            self._infos[name, None if offset is None else _sizes(offset, limits)] = _state(value, "_StorageInfo")
        self._prove()

    def _prove(self) -> None:
        """All files are there, all ranges lie in them and are apart."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for info in self._infos.values():
            name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
            if not isinstance(name, str) or type(offset) is not int or type(length) is not int:
                raise FormatError("an entry of DCP's metadata has no file, offset and length", offset=0)
            plain_parts(name, f"{self.folder.name}/{METADATA}")
            ranges.setdefault(name, []).append((offset, offset + length))
        missing = sorted(name for name in ranges if not self.folder.has(name))
        if missing:
            names = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
            message = f"{self.folder.name} lacks {len(missing)} of the {len(ranges)} files that it names: {names}"
            raise FormatError(message, path=self.folder.name, name=missing[0])
        for name, held in ranges.items():
            _prove_ranges(self.folder.open(name), held)

    def count(self, chunks: list[Any], name: str) -> None:
        """Refuse more chunks, of all tensors, than the metadata has room for."""
        self._chunks -= len(chunks)
        if self._chunks < 0:
            message = f"DCP's metadata lists {short(name)!r} in more chunks than it has room for (a bomb?)"
            raise FormatError(message, offset=0, name=short(name))

    def find(self, name: str, offset: tuple[int, ...] | None) -> Mapping[str, Any]:
        """Where an entry lies; a tensor in one piece may be kept without an offset."""
        info = self._infos.get((name, offset))
        if info is None and offset is not None and not any(offset):
            info = self._infos.get((name, None))
        if info is None:
            raise FormatError(f"DCP's metadata does not say where {short(name)!r} lies", offset=0, name=short(name))
        return info

    def source(self, info: Mapping[str, Any]) -> Source:
        """The bytes of an entry."""
        return WindowSource(self.folder.open(info["relative_path"]), info["offset"], info["length"])

    def packed(self, info: Mapping[str, Any], want: TensorInfo) -> Storage:
        """The bytes of a tensor that an extension has packed, or why they cannot be had."""
        source = self.source(info)
        why = why_not(source, info["transform_descriptors"])
        if why:
            return Storage("", want.nbytes, missing=why)
        self._count(want.nbytes, source, info["offset"])
        return Storage("", want.nbytes, data=PackedBytes(self._unpacker, source, want))

    def _count(self, nbytes: int, source: Source, at: int) -> None:
        self._inflated += nbytes
        self._stored += source.size
        if self._inflated > max(_MOST_INFLATED, _RATIO * self._stored):
            message = f"DCP's packed entries inflate to {self._inflated:,} bytes (a bomb?)"
            raise FormatError(message, path=source.name, offset=at)

    def read(self, name: str, info: Mapping[str, Any]) -> Any:
        """The object of an entry."""
        source = self.source(info)
        how = info.get("transform_descriptors")
        why = why_not(source, how) if how else ""
        if why:
            return unread(why)
        try:
            if not how:
                return read_file_index(source, self._limits).tree
            tree, nbytes = unpacked_object(source, self._limits)
            self._count(nbytes, source, info["offset"])
            return tree
        except FormatError as error:
            error.args = (f"the entry of {short(name)!r} at byte {info['offset']:,}: {error.args[0]}",)
            error.offset = None if error.offset is None else info["offset"] + error.offset
            error.path = source.name
            raise


def _prove_ranges(source: Source, ranges: list[tuple[int, int]]) -> None:
    last = 0
    for start, end in sorted(ranges):
        if start < last or end < start:
            raise FormatError(f"entries at byte {start:,} overlap", path=source.name, offset=start)
        if end > source.size:
            raise FormatError(
                f"the file is cut short: an entry ends at byte {end:,}, the file at {source.size:,}",
                path=source.name,
                offset=start,
            )
        last = end


def _value(name: str, described: Any, entries: _Entries, limits: Limits) -> Any:
    """A tensor, or the object of an entry of bytes."""
    if isinstance(described, Inert) and type(described).name == "BytesStorageMetadata":
        return entries.read(name, entries.find(name, None))
    fields = _state(described, "TensorStorageMetadata")
    dtype, shape, chunks = _dtype(fields.get("properties")), _sizes(fields.get("size"), limits), fields.get("chunks")
    if not isinstance(chunks, list):
        raise FormatError(f"{short(name)!r} has no list of chunks", offset=0, name=short(name))
    entries.count(chunks, name)
    boxes = [_state(chunk, "ChunkStorageMetadata") for chunk in chunks]
    places = [(_sizes(box.get("offsets"), limits), _sizes(box.get("sizes"), limits)) for box in boxes]
    places = [(at, size) for at, size in places if 0 not in size]
    entries.prover.prove(
        short(name), shape, places
    )  # before any is read: a list may have the same chunk a million times
    found = [_chunk(name, dtype, at, size, entries, shape) for at, size in places]
    if len(found) == 1 and isinstance(found[0], Composite):
        return found[0]
    made = [Chunk(at, info) for (at, _), info in zip(places, found, strict=True)]
    if made:
        return assemble(short(name), entries.folder, dtype, shape, made, entries.prover)
    return TensorInfo(form_of(dtype, shape), Storage(short(name), 0, data=b""))


def _dtype(properties: Any) -> str:
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if isinstance(dtype, type) and issubclass(dtype, Inert) and dtype.module == "torch" and dtype.name in DTYPES:
        return dtype.name
    raise FormatError("DCP's metadata has a dtype that anycard does not know", offset=0)


def _chunk(
    name: str, dtype: str, at: tuple[int, ...], shape: tuple[int, ...], entries: _Entries, whole: tuple[int, ...]
) -> Any:
    info = entries.find(name, at)
    if info.get("transform_descriptors"):
        storage = entries.packed(info, TensorInfo(form_of(dtype, shape), Storage("", 0)))
        storage.key = short(name)
        return TensorInfo(form_of(dtype, shape), storage)
    found = entries.read(name, info)
    if isinstance(found, Composite) and shape == whole:
        return found  # quantised: listed by its parts
    if not isinstance(found, TensorInfo) or found.dtype != dtype or found.shape != shape:
        raise FormatError(
            f"the entry of {short(name)!r} in {info['relative_path']} is {brief(found)}, not {dtype}, {list(shape)}",
            offset=info["offset"],
            name=short(name),
        )
    return found
