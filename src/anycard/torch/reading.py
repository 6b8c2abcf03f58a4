"""Stored tensors to `torch.Tensor`: new ones, and in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from zlib_ng import zlib_ng

from anycard.checkpoint import Checkpoint, open_checkpoint, tensor_bytes
from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits
from anycard.names.choosing import canonical_names
from anycard.tensors import DTYPES, Storage, TensorInfo, is_dense
from anycard.torch.dtypes import FROM_TORCH, TO_TORCH, byte_view
from anycard.warning import warn


def read_tensor(info: TensorInfo, *, limits: Limits = DEFAULT) -> torch.Tensor:
    """One stored tensor as a new CPU tensor: same dtype, shape, values; dense strides are kept.

    Raises:
        FormatError: Its bytes are not there, damaged, or it is no plain tensor.
    """
    dtype = TO_TORCH.get(info.dtype)
    if dtype is None or info.kind != "dense":
        raise FormatError(f"a {info.kind} tensor of {info.dtype} cannot be given as a plain tensor")
    if _direct(info):
        tensor = torch.empty_strided(info.shape, info.stride, dtype=dtype)
        fill_bytes(byte_view(tensor) if tensor.numel() else memoryview(b""), info)
        return tensor
    data = tensor_bytes(info, limits)
    if not len(data):
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(info.shape)


def _direct(info: TensorInfo) -> bool:
    """The stored bytes are the tensor's memory as it will be."""
    storage = info.storage
    return (
        storage.offset is not None
        and not storage.missing
        and not (info.conj or info.neg)
        and not (storage.big_endian and DTYPES[info.dtype].itemsize > 1)
        and is_dense(info.shape, info.stride)
    )


def fill_bytes(view: memoryview, info: TensorInfo, *, check: bool = True, limits: Limits = DEFAULT) -> None:
    """Read a dense tensor's bytes into memory; the CRC is checked while the bytes are warm.

    Raises:
        FormatError: Cut short, or the CRC of the whole storage does not match.
    """
    source, offset = info.storage.source, info.offset
    assert source is not None and offset is not None
    crc = 0
    whole = check and info.storage.crc is not None and info.start == 0 and len(view) == info.storage.nbytes
    for start in range(0, len(view), limits.chunk_nbytes):
        part = view[start : start + limits.chunk_nbytes]
        source.read_into(offset + start, part)
        if whole:
            crc = zlib_ng.crc32(part, crc)
    if whole and crc != info.storage.crc:
        raise damaged(info.storage)


def damaged(storage: Storage) -> FormatError:
    """The error for a storage whose CRC does not match."""
    return FormatError(
        f"storage {storage.key} is damaged: its CRC-32 does not match. Copy or download the file again.",
        offset=storage.offset,
    )


def copy_into(target: torch.Tensor, info: TensorInfo, *, check: bool = True, limits: Limits = DEFAULT) -> None:
    """Write a stored tensor into an existing one: straight where the bytes are the same, else by a copy."""
    same = FROM_TORCH.get(target.dtype) == info.dtype and tuple(target.shape) == info.shape
    if same and target.is_cpu and _direct(info) and _same_memory(target, info) and type(target.data) is torch.Tensor:
        if target.numel():
            fill_bytes(byte_view(target.detach()), info, check=check, limits=limits)
        torch.autograd.graph.increment_version(target)
        return
    with torch.no_grad():
        value = read_tensor(info, limits=limits)
        target.detach().copy_(value.reshape(target.shape))
        torch.autograd.graph.increment_version(target)


def _same_memory(target: torch.Tensor, info: TensorInfo) -> bool:
    stride = tuple(target.stride())
    if not is_dense(info.shape, stride) or target.is_conj() or target.is_neg():
        return False
    return all(a == b for a, b, size in zip(stride, info.stride, info.shape, strict=True) if size > 1)


def read(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    key: str | None = None,
    member: str | None = None,
    canonical: bool = True,
    progress: Any = None,
) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of any format: canonical name -> new CPU tensor.

    Args:
        path: A path or an open binary file.
        key: Which state dict, where the file holds several.
        canonical: False gives the names as stored.

    Raises:
        FormatError: Damaged, or no checkpoint.
        ChoiceError: The file holds several state dicts (listed) and no `key` was given.
    """
    with open_checkpoint(path) as ckpt:
        tensors = ckpt.weights(key, canonical=canonical)
        if canonical:
            _say_what_went(ckpt, key)
        return read_all(tensors, ckpt.path, progress)


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


def read_all(tensors: Mapping[str, TensorInfo], path: str, progress: Any = None) -> dict[str, torch.Tensor]:
    """New tensors for all; tied ones are read once and share memory."""
    from anycard.progress import counting

    made: list[tuple[TensorInfo, torch.Tensor]] = []
    by_place: dict[tuple[int, int], list[int]] = {}
    result = {}
    with counting(progress, sum(info.nbytes for info in tensors.values())) as done:
        for name, info in tensors.items():
            place = (id(info.storage), info.start)
            known = next((made[i][1] for i in by_place.get(place, ()) if made[i][0].same_bytes(info)), None)
            if known is None:
                known = _named(info, name, path)
                by_place.setdefault(place, []).append(len(made))
                made.append((info, known))
            result[name] = known
            done(info.nbytes)
    return result


def _named(info: TensorInfo, name: str, path: str) -> torch.Tensor:
    try:
        return read_tensor(info)
    except FormatError as error:
        raise FormatError(f"{name}: {error.args[0]}", path=path, name=name, offset=error.offset) from None
