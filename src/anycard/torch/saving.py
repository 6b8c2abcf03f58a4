"""`save`: collect canonical names and storages, plan the records, write them atomically."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch import nn

from anycard.arguments import path_text, refuse_odd, shown
from anycard.collection import uncollected
from anycard.disk.atomic import replace_file
from anycard.disk.pieces import Piece, counted
from anycard.errors import CheckpointError
from anycard.formats.registry import format_for
from anycard.formats.safetensors import KEPT, OURS
from anycard.formats.safetensors_writer import write_safetensors
from anycard.formats.torch_zip_writer import write_torch_zip
from anycard.limits import DEFAULT
from anycard.pickles.writer import dump
from anycard.progress import Progress, counting
from anycard.tensors import DTYPES
from anycard.torch.dtypes import FROM_TORCH
from anycard.torch.modules import refuse_assigned_state_dict, walk
from anycard.torch.plain_data import plain_data
from anycard.torch.state import state_of
from anycard.torch.storages import Storages, identity, refuse_kinds
from anycard.torch.tensor_piece import TensorPiece
from anycard.torch.whole import pickle_whole

Path = str | os.PathLike[str] | BinaryIO


def save(obj: Any, path: Path, *, whole: bool = False, progress: Progress = None) -> None:
    """Save a model's weights, a whole model, or a dict of objects; canonical names, free of cards.

    Args:
        obj: An `nn.Module`, however wrapped; a dict of tensors; a dict of modules, optimizers and plain data.
        path: Where. The suffix says the format: `.safetensors`, or `.pt .pth .pkl .bin .ckpt .pth.tar`
            (torch zip, as open files). The old file stays until the new one is whole.
        whole: Pickle the module itself: structure and weights.
        progress: True for a bar on stderr, or a function of (done, total) bytes.

    Raises:
        ValueError: No suffix, or an unknown one.
        TypeError: The object cannot be saved so.
        CheckpointError: Something in it cannot be written; names it.
    """
    refuse_odd(progress=progress)
    if not isinstance(path, (str, os.PathLike)) and not hasattr(path, "write"):
        swapped = "; the object comes first: save(model, path)" if isinstance(obj, (str, os.PathLike)) else ""
        raise TypeError(f"save takes a path or an open binary file, not {shown(path)}{swapped}")
    kind = "torch zip" if not isinstance(path, (str, os.PathLike)) else format_for(path_text(path))
    if whole and not isinstance(obj, nn.Module):
        raise TypeError(f"whole=True saves an nn.Module, not a {type(obj).__name__}")
    if whole and kind != "torch zip":
        raise ValueError("safetensors holds tensors only: save a whole model as .pt, .pth or .pkl")
    if whole:
        walked = walk(obj)
        refuse_assigned_state_dict(walked, walked)
    with uncollected():
        _save(obj, path, kind, whole, progress)


def _save(obj: Any, path: Path, kind: str, whole: bool, progress: Progress) -> None:
    if kind == "safetensors":
        rows, metadata, ties = _for_safetensors(obj)
        with counting(progress, sum(row[3].nbytes for row in rows)) as done, _written(path) as file:
            rows = [(name, dtype, shape, counted(piece, done)) for name, dtype, shape, piece in rows]
            write_safetensors(file, rows, metadata, DEFAULT, ties=ties)
        return
    pickled, pieces, mark = pickle_whole(obj) if whole else _for_zip(obj)
    with counting(progress, sum(piece.nbytes for piece in pieces)) as done, _written(path) as file:
        write_torch_zip(file, pickled, [counted(piece, done) for piece in pieces], mark, DEFAULT)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file to write; what was written goes to the path, or into the caller's open file, once it is whole."""
    if isinstance(path, (str, os.PathLike)):
        with replace_file(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        while block := file.read(DEFAULT.chunk_nbytes):
            _write_all(path, block)


def _write_all(file: BinaryIO, block: bytes) -> None:
    """Write a block into the caller's file, which may take a part of it at a time."""
    while block:
        taken: Any = file.write(block)
        if type(taken) is not int and not isinstance(file, io.RawIOBase):
            return  # an object of the caller's that says nothing of what it takes
        if taken is None or taken <= 0:
            raise OSError(errno.EIO, f"the file took none of {len(block):,} bytes: what stands in it is cut short")
        block = block[taken:]


def _for_zip(obj: Any) -> tuple[bytes, list[Piece], dict[str, Any]]:
    """The pickle, the storages and anycard's own record."""
    known = (nn.Module, Mapping, torch.Tensor, list, tuple)
    if not isinstance(obj, known) and not callable(getattr(obj, "state_dict", None)):
        raise TypeError(f"save takes a module, a dict, a tensor or an object with state_dict, not {type(obj).__name__}")
    storages = Storages()
    mark: dict[str, Any] = {"anycard": 1}
    tree = plain_data(obj, storages, mark)
    return dump(tree), storages.pieces, mark


_Rows = list[tuple[str, str, tuple[int, ...], Piece]]


def _for_safetensors(obj: Any) -> tuple[_Rows, dict[str, str], dict[str, str]]:
    """Name, dtype, shape and bytes of each tensor; the metadata; second names of tied tensors."""
    mark: dict[str, Any] = {"anycard": 1}
    if isinstance(obj, nn.Module):
        state, wrappers = state_of(obj)
        if wrappers:
            mark["wrappers"] = wrappers
    elif isinstance(obj, Mapping):
        state = obj  # type: ignore[assignment]
    else:
        raise TypeError(f"safetensors holds a module's weights or a dict of tensors, not a {type(obj).__name__}")
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        mark["metadata"] = {path: dict(held) for path, held in versions.items() if dict(held) != {"version": 1}}
    rows, ties = _rows(state)
    text = json.dumps(mark, sort_keys=True, separators=(",", ":"), default=str)
    return rows, {OURS: text, **ties}, ties


def _rows(state: Mapping[str, Any]) -> tuple[_Rows, dict[str, str]]:
    rows: _Rows = []
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"the name {name!r:.80} is no text, as safetensors needs", name=str(name)[:80])
        if not isinstance(tensor, torch.Tensor):
            message = f"{name} is a {type(tensor).__name__}: safetensors holds tensors only; save as .pt or .pth"
            raise CheckpointError(message, name=name)
        refuse_kinds(tensor, name)
        kept = first.setdefault(identity(tensor), name)
        if kept is not name and name not in KEPT:
            ties[name] = kept
            continue
        dtype = FROM_TORCH[tensor.dtype]
        if DTYPES[dtype].safetensors is None:
            raise CheckpointError(f"{name}: safetensors has no {dtype}; save as .pt or .pth", name=name)
        rows.append((name, dtype, tuple(tensor.shape), TensorPiece(tensor)))
    return rows, ties
