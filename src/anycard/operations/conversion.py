"""`convert`: torch zip or legacy stream to safetensors and back, without torch."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anycard.checkpoint import Checkpoint, open_checkpoint, tensor_bytes
from anycard.disk.atomic import replace_file
from anycard.disk.pieces import FileRange, Lazy, Piece
from anycard.errors import CheckpointError
from anycard.formats.registry import format_for
from anycard.formats.safetensors import write_safetensors
from anycard.formats.torch_zip_writer import write_torch_zip
from anycard.limits import DEFAULT
from anycard.pickles.writer import TensorRef, dump
from anycard.progress import Progress, counting
from anycard.tensors import DTYPES, TensorInfo, row_major


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        src, dst, format: The files, and the format written.
        tensors: How many tensors went over.
        left_behind: Full paths of what the target cannot hold.
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
    """Write a file's state dict in the format of `dst`'s suffix, under canonical names.

    Raises:
        ChoiceError: The file holds several state dicts, and no `key` was given.
        CheckpointError: The format cannot hold a tensor; names it. `dst` is as it was.
        ValueError: The suffix of `dst` says no format.
    """
    kind = format_for(os.fspath(dst))
    with open_checkpoint(src) as ckpt:
        found = ckpt.chosen(key)
        weights = ckpt.weights(key)
        mark = _mark(ckpt, found.versions)
        with counting(progress, sum(i.nbytes for i in weights.values())) as done, replace_file(dst) as file:
            if kind == "safetensors":
                rows, ties = _rows(weights, done)
                metadata = {"anycard": json.dumps(mark, sort_keys=True, separators=(",", ":")), **ties}
                write_safetensors(file, rows, metadata, DEFAULT, ties=ties)
            else:
                tree, pieces = _tree(weights, mark, done)
                write_torch_zip(file, dump(tree), pieces, mark, DEFAULT)
        inside = {f"{found.key}.{name}" if found.key else name for name in found.tensors}
        left = [name for name in ckpt.tensors if name not in inside] + [n for n in ckpt.objects if n]
        wrappers = ckpt.wrappers
    return Conversion(os.fspath(src), os.fspath(dst), kind, len(weights), tuple(left), wrappers)


def _mark(ckpt: Checkpoint, versions: Mapping[str, int]) -> dict[str, Any]:
    from anycard.names.wrappers import outer_prefix, without_segments

    mark = {**ckpt.mark, "anycard": 1}
    prefix = "" if ckpt.marked else outer_prefix(map(without_segments, ckpt.chosen().tensors)) if versions else ""
    kept = {without_segments(p).removeprefix(prefix): v for p, v in versions.items() if v != 1}
    if kept:
        mark["versions"] = kept
    return mark


def _rows(
    weights: Mapping[str, TensorInfo], done: Any
) -> tuple[list[tuple[str, str, tuple[int, ...], Piece]], dict[str, str]]:
    rows: list[tuple[str, str, tuple[int, ...], Piece]] = []
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, info in weights.items():
        place = (id(info.storage), info.start, info.shape, info.stride, info.dtype)
        if info.nbytes and place in first:
            ties[name] = first[place]
            continue
        first[place] = name
        if DTYPES[info.dtype].safetensors is None:
            raise CheckpointError(f"{name}: safetensors has no {info.dtype}", name=name)
        rows.append((name, info.dtype, info.shape, _piece(info, done)))
    return rows, ties


def _piece(info: TensorInfo, done: Any) -> Piece:
    plain = not (info.conj or info.neg or info.storage.big_endian or info.storage.missing)
    if plain and info.contiguous and info.storage.source is not None and info.offset is not None:
        done(info.nbytes)
        return FileRange(info.storage.source, info.offset, info.nbytes)
    done(info.nbytes)
    return Lazy(info.nbytes, lambda: tensor_bytes(info))


def _tree(weights: Mapping[str, TensorInfo], mark: dict[str, Any], done: Any) -> tuple[Any, list[Piece]]:
    tree: OrderedDict[str, Any] = OrderedDict()
    pieces: list[Piece] = []
    known: dict[tuple[Any, ...], TensorRef] = {}
    for name, info in weights.items():
        place = (id(info.storage), info.start, info.shape, info.stride, info.dtype)
        if place not in known or not info.nbytes:
            key = str(len(pieces))
            pieces.append(_piece(info, done))
            known[place] = TensorRef(key, info.dtype, "cpu", info.numel, 0, info.shape, row_major(info.shape))
        tree[name] = known[place]
    versions = mark.get("versions")
    if isinstance(versions, dict):
        paths = {"": 1, **{n.rpartition(".")[0]: 1 for n in weights}, **versions}
        tree._metadata = OrderedDict((p, {"version": v}) for p, v in paths.items())  # type: ignore[attr-defined]
    return tree, pieces
