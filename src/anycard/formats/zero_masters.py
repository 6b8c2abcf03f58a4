"""DeepSpeed's fp32 masters: flat vectors cut over the ranks, put together into tensors under the model's names.

ZeRO-1 and 2: each group of parameters is one vector; the ranks hold it one after the other, some padding at its
end. ZeRO-3: each parameter is cut in as many equal parts as there are ranks, the last one padded; a rank's parts
of all parameters lie one after the other, in one vector or several.

Source: deepspeed/utils/zero_to_fp32.py, runtime/engine.py `_get_zero_param_shapes`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from anycard.disk.folder import Folder
from anycard.errors import FormatError
from anycard.formats.assembled import Chunk, Prover, assemble
from anycard.formats.index import Index
from anycard.formats.registry import read_file_index
from anycard.limits import Limits
from anycard.pickles.brief import brief
from anycard.pickles.views import MOST_ELEMENTS, short
from anycard.tensors import DTYPES, Storage, TensorInfo, form_of, row_major

MASTERS = "zero_fp32_masters"  # what `member=` calls them
_FILE = re.compile(
    r"(?:bf16_|fp16_)?(?:zero_pp_rank_(?P<rank>\d{1,6})_)?mp_rank_(?P<mp>\d{2,6})_(?P<kind>model|optim)_states\.pt"
)
_STATES = "_states.pt"
_GROUPS = "single_partition_of_fp32_groups"  # ZeRO-1 and 2
_FLAT = "fp32_flat_groups"  # ZeRO-3


def are_meant(files: Collection[str], member: str | None) -> bool:
    """`member` names them; or there are no other weights, as with ZeRO-3, which keeps no whole parameter."""
    ranked = [found for name in files if (found := _FILE.fullmatch(name)) and found["rank"] is not None]
    kinds = {found["kind"] for found in ranked}
    return kinds == {"model", "optim"} if member is None else member == MASTERS and "optim" in kinds


def read_index(folder: Folder, files: Collection[str], limits: Limits) -> Index:
    """The masters, with the model's buffers and what it did not train, in the order of its state dict.

    Raises:
        FormatError: A rank's file is missing; the vectors have not the elements that the shapes ask for; or the
            model is cut by more than ZeRO (tensor, pipeline or expert parallelism).
    """
    models, optims = _by_rank(folder, files, "model"), _by_rank(folder, files, "optim")
    states = [_dict(_tree(folder, name, limits), name) for name in models]
    parts = [_dict(_dict(_tree(folder, name, limits), name).get("optimizer_state_dict"), name) for name in optims]
    _refuse_missing(folder, parts, len(optims))
    job = _Job(folder, states, limits)
    whole = _GROUPS in parts[0]
    made = job.of_groups(parts) if whole else job.of_parameters(parts)
    tree = _with_others(made, states[0])
    emptied = [] if whole else [name for name, value in tree.items() if name not in made and _emptied(value)]
    if emptied:
        raise FormatError(f"no rank holds the master of {short(emptied[0])!r}", path=folder.name, name=emptied[0])
    metadata = {MASTERS: list(made), "zero_fp32_files": optims}
    version = states[0].get("ds_version")
    return Index(
        "DeepSpeed ZeRO", tree, folder, {**metadata, "ds_version": version} if type(version) is str else metadata
    )


def _by_rank(folder: Folder, files: Collection[str], kind: str) -> list[str]:
    """The files of a kind in the order of the ranks."""
    ranks: dict[int, str] = {}
    for name in files:
        found = _FILE.fullmatch(name)
        if name.endswith(_STATES) and (found is None or int(found["mp"])):
            why = "which is of a model cut by tensor, pipeline or expert parallelism: its masters are not put together"
            raise FormatError(f"{folder.name} has a file {name}, {why}", path=folder.name, name=name)
        if found is not None and found["kind"] == kind:
            ranks[int(found["rank"] or 0)] = name
    missing = [str(rank) for rank in range(max(ranks, default=0)) if rank not in ranks][:20]
    if missing or not ranks:
        which = f"of rank {', '.join(missing)}" if missing else "of any rank"
        raise FormatError(f"{folder.name} lacks the {kind} states {which}", path=folder.name)
    return [ranks[rank] for rank in sorted(ranks)]


def _tree(folder: Folder, name: str, limits: Limits) -> Any:
    source = folder.open(name)
    try:
        return read_file_index(source, limits).tree
    except FormatError as error:
        error.path = error.path or source.name
        raise


def _dict(held: Any, file: str) -> Mapping[str, Any]:
    if not isinstance(held, Mapping):
        raise FormatError(f"{file} is not what DeepSpeed writes", name=file)
    return held


def _refuse_missing(folder: Folder, parts: Sequence[Mapping[str, Any]], count: int) -> None:
    """As many files as the partitions that each of them counts; no padding between parameters."""
    said = parts[0].get("partition_count")
    counts = said if isinstance(said, list) else [said]
    if counts != [count] * len(counts):
        message = (
            f"{folder.name} has the optimizer states of {count} ranks, and they say {brief(counts)}: some are missing"
        )
        raise FormatError(message, path=folder.name)
    between = parts[0].get("param_alignment_paddings")
    if isinstance(between, list) and any(isinstance(group, list) and any(group) for group in between):
        raise FormatError("the masters have padding between them: they are not put together", path=folder.name)


class _Line:
    """Flat fp32 tensors one after the other, cut anywhere."""

    def __init__(self, parts: Any) -> None:
        if not isinstance(parts, list) or not all(_flat(part) for part in parts):
            raise FormatError("the fp32 masters are no flat float32 tensors")
        self._parts: list[TensorInfo] = parts
        self._starts = [0, *accumulate(part.numel for part in parts)]
        self.size = self._starts[-1]

    def cut(self, start: int, stop: int) -> list[TensorInfo]:
        """The pieces from one element to another."""
        if stop > self.size:
            raise FormatError(f"the fp32 masters have {self.size:,} elements, {stop:,} are asked for")
        pieces = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            low, high = self._starts[index], min(stop, self._starts[index + 1])
            if high > start:
                pieces.append(_cut(self._parts[index], start - low, high - low))
            start, index = max(start, high), index + 1
        return pieces


def _flat(part: Any) -> bool:
    return isinstance(part, TensorInfo) and part.dtype == "float32" and len(part.shape) == 1 and part.contiguous


def _cut(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    at = info.start + start * DTYPES[info.dtype].itemsize
    return info.replace(shape=(stop - start,), stride=(1,), start=at)


class _Job:
    """One read: the folder, its model states by rank, what may still be compared."""

    def __init__(self, folder: Folder, states: Sequence[Mapping[str, Any]], limits: Limits) -> None:
        self._folder, self._states, self._limits = folder, states, limits
        self._prover = Prover()

    def of_groups(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, TensorInfo]:
        """ZeRO-1 and 2."""
        shapes = self._shapes(self._states[0].get("param_shapes"))
        groups = [part.get(_GROUPS) for part in parts]
        if not all(isinstance(group, list) and len(group) == len(shapes) for group in groups):
            raise FormatError("the ranks' fp32 groups are not as many as the groups of shapes", path=self._folder.name)
        made: dict[str, TensorInfo] = {}
        for index, group in enumerate(shapes):
            line = _Line([held[index] for held in groups if held is not None])
            at = 0
            for name, shape in group.items():
                made[name] = self._put(name, shape, line.cut(at, at := at + math.prod(shape)))
            align = 2 * len(parts)
            if -(-at // align) != -(-line.size // align):
                self._refuse_size(at, line.size)
        held = self._shapes(self._states[0].get("frozen_param_shapes"))
        whole = self._states[0].get("frozen_param_fragments")
        frozen = whole if isinstance(whole, Mapping) else {}
        names = [name for group in held for name in group if isinstance(frozen.get(name), TensorInfo)]
        return {**{name: frozen[name] for name in names}, **made}

    def of_parameters(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, TensorInfo]:
        """ZeRO-3."""
        lines = [_Line(part.get(_FLAT)) for part in parts]
        made: dict[str, TensorInfo] = {}
        at = 0
        for group in self._shapes(self._states[0].get("param_shapes")):
            for name, shape in group.items():
                numel = math.prod(shape)
                each = -(-numel // len(lines))
                cuts = [line.cut(at, at + max(min(each, numel - r * each), 0)) for r, line in enumerate(lines)]
                made[name] = self._put(name, shape, [piece for cut in cuts for piece in cut])
                at += each
        if any(line.size != at for line in lines):
            self._refuse_size(at, lines[0].size)
        return {**self._frozen(len(lines)), **made}

    def _frozen(self, ranks: int) -> dict[str, TensorInfo]:
        """Parameters that were not trained: parts of them beside each rank's model states."""
        shapes = self._shapes(self._states[0].get("frozen_param_shapes"))
        held = [state.get("frozen_param_fragments") for state in self._states]
        made: dict[str, TensorInfo] = {}
        for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
            left = math.prod(shape)
            pieces = []
            for fragments in held:
                part = fragments.get(name) if isinstance(fragments, Mapping) else None
                if len(held) != ranks or not isinstance(part, TensorInfo) or not part.contiguous:
                    raise FormatError(f"the parts of {short(name)!r} are not with every rank", path=self._folder.name)
                pieces.append(_cut(part, 0, min(left, part.numel)))
                left -= pieces[-1].numel
            made[name] = self._put(name, shape, pieces)
        return made

    def _put(self, name: str, shape: tuple[int, ...], pieces: Sequence[TensorInfo]) -> TensorInfo:
        """The tensor of a shape that pieces make, one after the other."""
        dtype = pieces[0].dtype if pieces else "float32"
        if any(piece.dtype != dtype for piece in pieces):
            raise FormatError(f"the parts of {short(name)!r} have several dtypes", path=self._folder.name)
        if not math.prod(shape):
            return TensorInfo(form_of(dtype, shape), Storage(short(name), 0, data=b""))
        ends = accumulate((piece.numel for piece in pieces), initial=0)
        chunks = [Chunk((at,), piece) for at, piece in zip(ends, pieces, strict=False)]
        flat = assemble(short(name), self._folder, dtype, (math.prod(shape),), chunks, self._prover)
        return flat.replace(shape=shape, stride=row_major(shape))

    def _shapes(self, held: Any) -> list[dict[str, tuple[int, ...]]]:
        """Groups of name -> shape; none where there are none."""
        groups = held if isinstance(held, list) else [] if held is None else [held]
        made: list[dict[str, tuple[int, ...]]] = []
        for group in groups:
            sizes = {name: self._shape(name, shape) for name, shape in _dict(group, "param_shapes").items()}
            if any(sizes.keys() & other.keys() for other in made):
                raise FormatError("a parameter is in two groups", path=self._folder.name)
            made.append(sizes)
        return made

    def _shape(self, name: Any, shape: Any) -> tuple[int, ...]:
        good = isinstance(name, str) and isinstance(shape, (tuple, list)) and len(shape) <= self._limits.rank
        if not good or any(type(v) is not int or not 0 <= v < MOST_ELEMENTS for v in shape):
            raise FormatError("a parameter's shape is none that torch can hold", path=self._folder.name)
        return tuple(shape)

    def _refuse_size(self, wanted: int, there: int) -> None:
        message = f"the parameters have {wanted:,} elements, the ranks' fp32 masters {there:,}: files of two saves?"
        raise FormatError(message, path=self._folder.name)


def _with_others(made: Mapping[str, TensorInfo], state: Mapping[str, Any]) -> dict[str, Any]:
    """The masters in the order of the model's state dict, and what that has beside them as it is."""
    module, shared = state.get("module"), state.get("shared_params")
    held = module if isinstance(module, Mapping) else {}
    ties = shared if isinstance(shared, Mapping) else {}
    tied = {name: made[kept] for name, kept in ties.items() if type(name) is type(kept) is str and kept in made}
    found = {**made, **tied}
    tree = {name: found.get(name, value) for name, value in held.items() if isinstance(name, str)}
    return {**tree, **found}


def _emptied(value: Any) -> bool:
    """What ZeRO-3 leaves in a parameter's place."""
    return isinstance(value, TensorInfo) and value.shape == (0,)
