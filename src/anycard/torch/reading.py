"""Stored tensors to `torch.Tensor`: new ones, and in place."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anycard.arguments import refuse_odd
from anycard.checkpoint import Checkpoint, open_checkpoint, refuse_more_than_stored, tensor_bytes
from anycard.collection import uncollected
from anycard.disk.source import Source
from anycard.disk.transfer import Reads, run_reads
from anycard.errors import FormatError, naming
from anycard.limits import DEFAULT, Limits
from anycard.names.choosing import canonical_names
from anycard.progress import Progress, counting
from anycard.tensors import Storage, TensorInfo, is_dense
from anycard.torch import staging
from anycard.torch.dtypes import PLAIN, TO_TORCH
from anycard.warning import warn


class Fill(NamedTuple):
    """A tensor of a model, the stored tensor that goes into it, and what errors call it.

    Attributes:
        plain: As `survey.Target` has it.
        alike: The tensor is plain, and of the stored shape and dtype.
    """

    tensor: torch.Tensor
    info: TensorInfo
    name: str
    plain: bool = False
    alike: bool = False


@dataclass(frozen=True, slots=True)
class Fills:
    """Many of them, in columns: each step for each tensor of a model is felt."""

    tensors: Sequence[torch.Tensor] = ()
    infos: Sequence[TensorInfo] = ()
    names: Sequence[str] = ()
    plain: Sequence[bool] = ()
    alike: Sequence[bool] = ()

    @classmethod
    def of(cls, rows: Iterable[Fill]) -> Fills:
        """From rows."""
        return cls(*columns) if (columns := list(zip(*rows, strict=True))) else cls()

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Fill]:
        return map(Fill, self.tensors, self.infos, self.names, self.plain, self.alike)

    def seen_anew(self) -> Fills:
        """The same, once code of the model's own has run: each tensor's form is to be looked at again."""
        unsure = [False] * len(self)
        return Fills(self.tensors, self.infos, self.names, unsure, unsure)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """Where the tensors' elements begin now."""
        return np.array([tensor.data_ptr() for tensor in self.tensors], np.uint64)

    @property
    def nbytes(self) -> NDArray[np.uint64]:
        """Bytes of the tensors' elements."""
        if all(self.alike):
            return np.array([info.form.nbytes for info in self.infos], np.uint64)
        return np.array([tensor.nbytes for tensor in self.tensors], np.uint64)


@dataclass
class Filling:
    """What filling some tensors comes to.

    Attributes:
        straight: What goes into memory that is to hold the very bytes that are stored.
        reads: These bytes, by their source, in the same order.
        staged: What takes a copy, one at a time.
        check: Compare CRCs while the bytes are warm, where a tensor is all of its storage.
    """

    straight: Fills
    reads: list[tuple[Source, Reads]]
    staged: Fills
    check: bool = True

    def run(self, done: Callable[[int], None] | None = None, *, limits: Limits = DEFAULT) -> None:
        """Write the stored tensors into the model's.

        Raises:
            FormatError: Cut short or damaged; names the tensor. What was filled before stays filled.
        """
        try:
            for source, reads in self.reads:
                run_reads(source, reads, done, limits=limits)
        finally:  # writing by address is nothing that autograd sees
            _increment_versions(self.straight.tensors)
        if len(self.staged):
            self._run_staged(done, limits)

    def _run_staged(self, done: Callable[[int], None] | None, limits: Limits) -> None:
        fitting, others = _divided(self.staged, lambda fill: staging.fits(fill.tensor, fill.info))
        try:
            for source, fills in _by_source(fitting).items():
                stage = staging.Staging(fills.tensors, fills.infos)
                within = limits if stage.readers is None else replace(limits, threads=stage.readers)
                run_reads(source, _reads(fills, self.check), done, stage=stage, limits=within)
        finally:
            _increment_versions(fitting.tensors)
        with torch.no_grad():
            for tensor, info, name, _, _ in others:
                tensor.detach().copy_(read_tensor(info, name, check=self.check, limits=limits).reshape(tensor.shape))
                if done is not None:
                    done(info.nbytes)


def _divided(fills: Fills, wanted: Callable[[Fill], bool]) -> tuple[Fills, Fills]:
    """Those that are wanted, and the others."""
    rows = [(fill, wanted(fill)) for fill in fills]
    return Fills.of(fill for fill, yes in rows if yes), Fills.of(fill for fill, yes in rows if not yes)


def _by_source(fills: Fills) -> dict[Source, Fills]:
    groups: dict[Source, list[Fill]] = {}
    for fill in fills:
        assert fill.info.storage.source is not None
        groups.setdefault(fill.info.storage.source, []).append(fill)
    return {source: Fills.of(group) for source, group in groups.items()}


def _increment_versions(tensors: Sequence[torch.Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # those made in inference mode have none
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def prepare(fills: Fills, *, check: bool = True) -> Filling:
    """See which tensors the bytes can go straight into; their memory is not to change until they have.

    Args:
        check: See `Filling`.
    """
    straight, staged = fills, Fills()
    if not _all_straight(fills):
        straight, staged = _divided(fills, _goes_straight)
    sources = [info.storage.source for info in straight.infos]
    if len(set(sources)) > 1:
        several = _by_source(straight)
        straight = Fills.of(chain.from_iterable(several.values()))
    else:
        several = {source: straight for source in sources[:1] if source is not None}
    reads = [(source, _reads(group, check)) for source, group in several.items()]
    return Filling(straight, reads, staged, check)


def _reads(fills: Fills, check: bool) -> Reads:
    infos = fills.infos
    storages = [info.storage for info in infos]
    offsets = [info.start + storage.offset for info, storage in zip(infos, storages, strict=True)]  # type: ignore[operator]
    nbytes = np.array([info.form.nbytes for info in infos], np.int64)
    crcs: list[int | None] = []
    if check:
        rows = zip(infos, storages, nbytes.tolist(), strict=True)
        crcs = [store.crc if info.start == 0 and size == store.nbytes else None for info, store, size in rows]
    return Reads(np.array(offsets, np.int64), nbytes, fills.addresses, fills.names, crcs)


def _all_straight(fills: Fills) -> bool:
    """All go straight, as a look at all at once tells; there may be others of which all do."""
    forms = {info.form for info in fills.infos}
    rows = all(form.row_major and not (form.conj or form.neg) for form in forms)
    return rows and all(fills.alike) and _all_in_files({info.storage for info in fills.infos})


def _all_in_files(storages: Iterable[Storage]) -> bool:
    """The stored bytes lie in files, as they lie in memory."""
    return all(s.source and s.offset is not None and not s.missing and not s.big_endian for s in storages)


def _goes_straight(fill: Fill) -> bool:
    """The tensor's memory is to hold the very bytes that are stored."""
    tensor, info, _, _, alike = fill
    if info.storage.source is None or not plain_bytes(info):
        return False
    if alike and info.form.row_major:
        return True
    return (
        TO_TORCH.get(info.dtype) is tensor.dtype
        and tensor.shape == info.shape
        and tensor.is_cpu
        and (type(tensor) in PLAIN or type(tensor.data) is torch.Tensor)
        and not (tensor.is_neg() or tensor.is_conj())
        and ((info.form.row_major and tensor.is_contiguous()) or _same_order(tensor.stride(), info))
    )


def _same_order(stride: tuple[int, ...], info: TensorInfo) -> bool:
    same = all(a == b for a, b, size in zip(stride, info.stride, info.shape, strict=True) if size > 1)
    return same and is_dense(info.shape, info.stride)


def plain_bytes(info: TensorInfo) -> bool:
    """The stored bytes lie in the file as they lie in memory."""
    storage, form = info.storage, info.form
    return (
        storage.offset is not None
        and not storage.missing
        and not (form.conj or form.neg)
        and not (storage.big_endian and info.itemsize > 1)
    )


def read_tensor(info: TensorInfo, name: str = "", *, check: bool = True, limits: Limits = DEFAULT) -> torch.Tensor:
    """One stored tensor as a new CPU tensor: same dtype, shape, values; dense strides are kept.

    Args:
        check: See `Filling`.

    Raises:
        FormatError: Its bytes are not there or damaged, or this PyTorch lacks its dtype.
    """
    tensor = empty_for(info)
    if tensor is not None:
        prepare(Fills.of([Fill(tensor, info, name or f"storage {info.storage.key}")]), check=check).run(limits=limits)
        return tensor
    dtype = TO_TORCH[info.dtype]
    try:
        data = tensor_bytes(info, limits)
    except FormatError as error:
        raise _named(error, name) from None
    if not len(data):
        return torch.empty(info.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(info.shape)


def _named(error: FormatError, name: str) -> FormatError:
    message = f"{name}: {error.args[0]}" if name else str(error.args[0])
    return FormatError(message, path=error.path, name=name or error.name, offset=error.offset)


def empty_for(info: TensorInfo) -> torch.Tensor | None:
    """New memory that the stored bytes can go straight into; None where they cannot.

    Raises:
        FormatError: This PyTorch lacks its dtype.
    """
    dtype = TO_TORCH.get(info.dtype)
    if dtype is None:
        raise FormatError(f"a tensor of {info.dtype} cannot be given: this PyTorch has no such dtype")
    if plain_bytes(info) and is_dense(info.shape, info.stride):
        return torch.empty_strided(info.shape, info.stride, dtype=dtype, device="cpu")
    return None


def read(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    key: str | None = None,
    member: str | None = None,
    canonical: bool = True,
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of any format: canonical name -> new CPU tensor.

    It is an `OrderedDict`; where the file tells its modules' versions, they are its `_metadata`, as in a state dict.

    Args:
        path: A path or an open binary file.
        key: Which state dict, where the file holds several.
        member: Which file, where this one holds checkpoints inside.
        canonical: False gives the names as stored.
        progress: True for a bar on stderr, or a function of (done, total) bytes.

    Raises:
        FormatError: Damaged, or no checkpoint.
        ChoiceError: The file holds several state dicts (listed) and no `key` was given.
    """
    refuse_odd(key=key, member=member, progress=progress)
    with uncollected(), open_checkpoint(path, member=member) as ckpt:
        tensors = ckpt.weights(key, canonical=canonical)
        if canonical:
            _say_what_went(ckpt, key)
        held = OrderedDict(read_all(tensors, ckpt.path, progress))
        if metadata := _metadata(ckpt, key, canonical=canonical):
            held._metadata = metadata  # type: ignore[attr-defined]
        return held


def _metadata(ckpt: Checkpoint, key: str | None, *, canonical: bool) -> Mapping[str, Any]:
    from anycard.operations.contents import versions

    found = ckpt.chosen(key)
    return versions(ckpt, found) if canonical else OrderedDict(found.metadata)


def _say_what_went(ckpt: Checkpoint, key: str | None) -> None:
    found = ckpt.chosen(key)
    if found.shadow:
        warn(
            f"{ckpt.path}: the model was saved after an assignment to its state_dict; these are the module's "
            f"own parameters, not the dict at {found.shadow!r}"
        )
    _, wrappers = canonical_names(found, marked=ckpt.marked)
    if "module" in wrappers and found.canonical is None:
        warn(f"{ckpt.path}: every name begins with 'module.', which was taken for a wrapper's and dropped "
             "(canonical=False keeps it)")  # fmt: skip


def read_all(tensors: Mapping[str, TensorInfo], path: str, progress: Progress = None) -> dict[str, torch.Tensor]:
    """New tensors for all; tied ones are read once and share memory.

    Raises:
        FormatError: Bytes are not there or damaged, or all tensors together are far more than what is stored.
    """
    made: dict[object, torch.Tensor] = {}
    fills = []
    result = {}
    with counting(progress, sum(info.nbytes for info in tensors.values())) as done, naming(path):
        refuse_more_than_stored(tensors.values(), DEFAULT)
        for name, info in tensors.items():
            place = info.place
            if place not in made:
                tensor = empty_for(info)
                if tensor is None:
                    tensor = read_tensor(info, name)
                    done(info.nbytes)
                else:
                    fills.append(Fill(tensor, info, name, plain=True, alike=True))
                made[place] = tensor
            else:
                done(info.nbytes)
            result[name] = made[place]
        prepare(Fills.of(fills)).run(done)
    return result
