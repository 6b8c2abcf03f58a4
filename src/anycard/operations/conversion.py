"""`convert`: any format that is read, to safetensors or a torch zip, without torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anycard.arguments import path_text, refuse_odd
from anycard.checkpoint import Checkpoint, open_checkpoint, refuse_more_than_stored, tensor_bytes
from anycard.collection import uncollected
from anycard.disk.atomic import replace_file
from anycard.disk.pieces import Piece, counted
from anycard.errors import CheckpointError, ChoiceError, naming
from anycard.formats.registry import format_for
from anycard.formats.safetensors import KEPT, OURS
from anycard.formats.safetensors_writer import write_safetensors
from anycard.formats.torch_zip_writer import write_torch_zip
from anycard.limits import DEFAULT
from anycard.names.choosing import canonical_names, wrapper_state
from anycard.names.paths import join
from anycard.names.stored import StateDict
from anycard.operations.contents import Copier, is_flat
from anycard.operations.proving import Proof
from anycard.pickles.writer import dump
from anycard.plans.matching import Match, canonical_metadata, versions_of_classes
from anycard.progress import Progress, counting
from anycard.tensors import DTYPES, TensorInfo

_OF_THE_SOURCE = ("whole", "modules", "metadata", "wrappers", "classes")  # what a mark says of the old file's object


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        src, dst, format: The files, and the format written.
        tensors: How many tensors went over.
        left_behind: Full paths of what the target cannot hold, or what was not asked for.
        wrappers: Wrapper segments that went from the names.
    """

    src: str
    dst: str
    format: str
    tensors: int
    left_behind: tuple[str, ...]
    wrappers: tuple[str, ...]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    key: str | None = None,
    member: str | None = None,
    progress: Progress = None,
) -> Conversion:
    """Write a file in the format of `dst`'s suffix, under canonical names.

    A torch zip takes all plain data and tensors; safetensors takes one state dict, and what else the file
    holds stays behind. With a `key`, that state dict alone goes over.

    Raises:
        ChoiceError: To safetensors without a `key`: several places in the file hold tensors.
        CheckpointError: The format cannot hold a tensor; names it. `dst` is as it was.
        ValueError: The suffix of `dst` says no format.
    """
    refuse_odd(key=key, member=member, progress=progress)
    source, target = path_text(src), path_text(dst)
    kind = format_for(target)
    write = _to_safetensors if kind == "safetensors" else _to_zip
    with uncollected(), open_checkpoint(source, member=member) as ckpt, naming(source):
        count, left = write(ckpt, key, target, progress)
        return Conversion(source, target, kind, count, left, ckpt.wrappers)


def _to_safetensors(ckpt: Checkpoint, key: str | None, dst: str, progress: Progress) -> tuple[int, tuple[str, ...]]:
    found = ckpt.chosen(key)
    if key is None:
        _refuse_other_tensors(ckpt, found)
    weights = ckpt.weights(key)
    refuse_more_than_stored(weights.values(), DEFAULT)
    with counting(progress, sum({info.place: info.nbytes for info in weights.values()}.values())) as done:
        proof = Proof(ckpt)
        rows, ties = _rows(weights, proof, done)
        text = json.dumps(_mark(ckpt, found), sort_keys=True, separators=(",", ":"))
        with replace_file(dst) as file:
            write_safetensors(file, rows, {OURS: text, **ties}, DEFAULT, ties=ties)
            proof.check()
    return len(weights), _beside(ckpt, found)


def _to_zip(ckpt: Checkpoint, key: str | None, dst: str, progress: Progress) -> tuple[int, tuple[str, ...]]:
    refuse_more_than_stored(ckpt.tensors.values(), DEFAULT)
    proof = Proof(ckpt)
    copier = Copier(ckpt, proof)
    dicts = ckpt.state_dicts
    found = ckpt.chosen(key) if key is not None or [d.key for d in dicts] == [""] else None
    whole = found is None or (key is None and is_flat(ckpt.tree, found))
    tree = copier.everything() if found is None or whole else copier.state_dict(found)
    mark = _beside_names({"anycard": 1}, ckpt, None) if found is None else _mark(ckpt, found)
    mark.pop("metadata", None)  # a torch zip has a place of its own for it
    with counting(progress, sum(piece.nbytes for piece in copier.pieces)) as done, replace_file(dst) as file:
        write_torch_zip(file, dump(tree), [counted(piece, done) for piece in copier.pieces], mark, DEFAULT)
        proof.check()
    return copier.count, tuple(copier.gone) if found is None or whole else _beside(ckpt, found)


def _refuse_other_tensors(ckpt: Checkpoint, found: StateDict) -> None:
    taken = {info.place for info in found.tensors.values()}  # under another name too: nothing is lost
    beside = {n: i for n, i in ckpt.tensors.items() if found.key and not n.startswith(found.key + ".")}
    others = [name for name, info in beside.items() if info.place not in taken]
    if others:
        raise ChoiceError(
            f"{ckpt.path} holds tensors beside {found.key!r}, which safetensors would lose: "
            f"{_places(others)}. "
            f"To take {found.key!r} alone: key={found.key!r}; a .pt or .pth keeps everything",
            path=ckpt.path,
        )


def _places(paths: list[str]) -> str:
    """Where tensors are, by the first part of their path: `optimizer (36)`."""
    counts = Counter(path.partition(".")[0] for path in paths)
    return ", ".join(f"{place} ({count:,})" for place, count in counts.most_common(10))


def _beside(ckpt: Checkpoint, found: StateDict) -> tuple[str, ...]:
    """Full paths of everything that is not in the state dict."""
    inside = {f"{found.key}.{name}" if found.key else name for name in found.tensors}
    return tuple([name for name in ckpt.tensors if name not in inside] + [name for name in ckpt.objects if name])


def _mark(ckpt: Checkpoint, found: StateDict) -> dict[str, Any]:
    """anycard's own record for a state dict that goes over: versions, and what belongs to wrappers."""
    names, _ = canonical_names(found, marked=ckpt.marked)
    mark: dict[str, Any] = {k: v for k, v in ckpt.mark.items() if k not in _OF_THE_SOURCE}
    mark["anycard"] = 1
    held = canonical_metadata(Match(found, "", {name: stored for stored, name in names.items()}, ()), ckpt.mark)
    if held or "metadata" in ckpt.mark:
        mark["metadata"] = {path: kept for path, kept in held.items() if kept != {"version": 1}}
    return _beside_names(mark, ckpt, found)


def _beside_names(mark: dict[str, Any], ckpt: Checkpoint, found: StateDict | None) -> dict[str, Any]:
    """The record, with what the state dicts do not tell: of all of the file, or of one that becomes its top."""
    of_classes = [each.key for each in ckpt.state_dicts if versions_of_classes(each, ckpt.mark)]
    if found is not None:
        of_classes = [""] if versions_of_classes(found, ckpt.mark) else []
    return _with_wrappers({**mark, "classes": of_classes} if of_classes else mark, ckpt, found)


def _with_wrappers(mark: dict[str, Any], ckpt: Checkpoint, found: StateDict | None) -> dict[str, Any]:
    """The record, with what belongs to wrappers."""
    told = ckpt.mark.get("wrappers")
    held = dict(told) if isinstance(told, Mapping) else {}
    for each in [] if ckpt.marked else ckpt.state_dicts if found is None else [found]:
        for name, stored in wrapper_state(each).items():
            held[join(each.key, name)] = int.from_bytes(tensor_bytes(each.tensors[stored]), "little")
    above = join(found.key, "") if found is not None and found.key else ""
    mine = {path.removeprefix(above): value for path, value in held.items() if path.startswith(above)}
    return {**mark, "wrappers": mine} if mine else mark


_Rows = list[tuple[str, str, tuple[int, ...], Piece]]


def _rows(weights: Mapping[str, TensorInfo], proof: Proof, done: Callable[[int], None]) -> tuple[_Rows, dict[str, str]]:
    rows: _Rows = []
    ties: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, info in weights.items():
        kept = first.setdefault(info.place, name)
        if kept != name and info.nbytes and name not in KEPT:
            ties[name] = kept
            continue
        if DTYPES[info.dtype].safetensors is None:
            raise CheckpointError(f"{name}: safetensors has no {info.dtype}; a .pt or .pth holds it", name=name)
        rows.append((name, info.dtype, info.shape, counted(proof.piece(info, name), done)))
    return rows, ties
