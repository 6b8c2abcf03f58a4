"""`save`: collect canonical names and storages, plan the records, write them atomically."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import nn

from anycard.disk.atomic import replace_file
from anycard.disk.pieces import Lazy, Piece
from anycard.errors import CheckpointError
from anycard.formats.registry import format_for
from anycard.formats.safetensors import write_safetensors
from anycard.formats.torch_zip_writer import write_torch_zip
from anycard.limits import DEFAULT
from anycard.pickles.writer import GlobalRef, Reduced, TensorRef, dump
from anycard.progress import Progress
from anycard.tensors import DTYPES, is_dense, row_major
from anycard.torch.dtypes import FROM_TORCH, byte_view
from anycard.torch.modules import (
    canonical_name,
    canonical_paths,
    live_wrapper,
    refuse_assigned_state_dict,
)

Path = str | os.PathLike[str] | BinaryIO


def save(obj: Any, path: Path, *, whole: bool = False, progress: Progress = None) -> None:
    """Save a model's weights, a whole model, or a dict of objects; canonical names, free of cards.

    Args:
        obj: An `nn.Module`, however wrapped; a dict of tensors; a dict of modules, optimizers and plain data.
        path: Where. The suffix says the format: `.safetensors`, or `.pt .pth .pkl .bin .ckpt .pth.tar`
            (torch zip, as open files). The old file stays until the new one is whole.
        whole: Pickle the module itself: structure and weights.

    Raises:
        ValueError: No suffix, or an unknown one.
        TypeError: The object cannot be saved so.
        CheckpointError: Something in it cannot be written; names it.
    """
    kind = "torch zip" if not isinstance(path, (str, os.PathLike)) else format_for(os.fspath(path))
    if whole:
        from anycard.torch.whole import write_whole

        if not isinstance(obj, nn.Module):
            raise TypeError(f"whole=True saves an nn.Module, not a {type(obj).__name__}")
        if kind != "torch zip":
            raise ValueError("safetensors holds tensors only: save a whole model as .pt, .pth or .pkl")
        refuse_assigned_state_dict(obj)
        _write(path, lambda file: write_whole(obj, file))
    elif kind == "safetensors":
        _write(path, lambda file: _safetensors(obj, file))
    else:
        _write(path, lambda file: _zip(obj, file))


def _write(path: Path, write: Any) -> None:
    if isinstance(path, (str, os.PathLike)):
        with replace_file(path) as file:
            write(file)
        return
    with tempfile.TemporaryFile() as file:
        write(file)
        file.seek(0)
        while block := file.read(DEFAULT.chunk_nbytes):
            path.write(block)


def state_of(model: nn.Module) -> tuple[OrderedDict[str, Any], dict[str, Any]]:
    """A model's real state dict under canonical names, and the state that belongs to its wrappers."""
    refuse_assigned_state_dict(model)
    paths = canonical_paths(model)
    live = model.state_dict()
    own = _wrapper_names(model)
    state: OrderedDict[str, Any] = OrderedDict()
    wrappers: dict[str, Any] = {}
    for name, value in live.items():
        if name in own:
            wrappers[own[name]] = int(value)
            continue
        canonical = canonical_name(name, paths)
        if canonical in state:
            raise CheckpointError(f"two tensors would both be called {canonical!r}", name=canonical)
        state[canonical] = value
    metadata = getattr(live, "_metadata", None)
    if metadata is not None:
        held = OrderedDict((paths.get(p, p), v) for p, v in metadata.items() if _keeps(model, p, paths))
        state._metadata = held  # type: ignore[attr-defined]
    return state, wrappers


def _keeps(model: nn.Module, path: str, paths: Mapping[str, str]) -> bool:
    """The path's own module, not a wrapper of it, gives the version."""
    try:
        return live_wrapper(model.get_submodule(path)) is None
    except AttributeError:
        return True


def _wrapper_names(model: nn.Module) -> dict[str, str]:
    found = {}
    for path, module in model.named_modules():
        row = live_wrapper(module)
        for name in row.own if row is not None else ():
            found[f"{path}.{name}" if path else name] = name
    return found


class Storages:
    """Gathers tensors into storages: overlapping views share one, everything else is compact."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._known: dict[tuple[Any, ...], TensorRef] = {}
        self._alive: list[torch.Tensor] = []

    def ref(self, tensor: torch.Tensor, name: str) -> TensorRef:
        """The reference to write for a tensor; its bytes are queued once."""
        _refuse_kinds(tensor, name)
        parameter = isinstance(tensor, nn.Parameter)
        place = (*_identity(tensor), parameter, tensor.requires_grad)
        if place in self._known:
            return self._known[place]
        bare = (*_identity(tensor), None, None)
        key = self._known[bare].storage_key if bare in self._known else self._queue(tensor)
        dtype = FROM_TORCH[tensor.dtype]
        shape = tuple(tensor.shape)
        stride = tuple(tensor.stride()) if _keeps_strides(tensor) else row_major(shape)
        grad = bool(tensor.requires_grad and parameter)
        ref = TensorRef(key, dtype, "cpu", tensor.numel(), 0, shape, stride, requires_grad=grad, parameter=parameter)
        self._known[place] = self._known[bare] = ref
        self._alive.append(tensor)
        return ref

    def _queue(self, tensor: torch.Tensor) -> str:
        nbytes = tensor.numel() * tensor.element_size()
        self.pieces.append(Lazy(nbytes, lambda: dense_bytes(tensor, row_major_order=False)))
        return str(len(self.pieces) - 1)


def _refuse_kinds(tensor: torch.Tensor, name: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(f"{name} is a {tensor.layout} tensor; only dense tensors are written", name=name)
    if tensor.is_meta:
        raise CheckpointError(f"{name} stands on the meta device: it has no values to save", name=name)
    if tensor.dtype not in FROM_TORCH:
        raise CheckpointError(f"{name}: {tensor.dtype} cannot be written", name=name)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return (
        place, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype,
        str(tensor.device), tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def _keeps_strides(tensor: torch.Tensor) -> bool:
    return is_dense(tuple(tensor.shape), tuple(tensor.stride()))


def dense_bytes(tensor: torch.Tensor, *, row_major_order: bool) -> memoryview:
    """A tensor's bytes on the CPU: as they lie where dense, else row-major."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if row_major_order or not _keeps_strides(plain):
        plain = plain.contiguous()
    return byte_view(plain) if plain.numel() else memoryview(b"")


def _zip(obj: Any, file: BinaryIO) -> None:
    storages = Storages()
    mark: dict[str, Any] = {"anycard": 1}
    if isinstance(obj, nn.Module):
        data, wrappers = state_of(obj)
        if wrappers:
            mark["wrappers"] = wrappers
        tree = _plain(data, storages, "", mark)
    elif isinstance(obj, Mapping):
        tree = _plain(obj, storages, "", mark)
    elif isinstance(obj, torch.Tensor):
        tree = storages.ref(obj, "the tensor")
    else:
        raise TypeError(f"save takes a module, a dict or a tensor, not a {type(obj).__name__}")
    write_torch_zip(file, dump(tree), storages.pieces, mark, DEFAULT)


def _plain(value: Any, storages: Storages, name: str, mark: dict[str, Any]) -> Any:
    """The value as what the pickler writes; anything that is no plain data is an error."""
    if value is None or type(value) in (bool, int, float, str, bytes, complex):
        return value
    if isinstance(value, torch.Tensor):
        return storages.ref(value, name)
    if isinstance(value, nn.Module):
        state, wrappers = state_of(value)
        mark.setdefault("wrappers", {}).update(wrappers)
        return _plain(state, storages, name, mark)
    if isinstance(value, Mapping):
        return _plain_mapping(value, storages, name, mark)
    if isinstance(value, torch.Size):
        return Reduced(GlobalRef("torch", "Size"), (tuple(value),))
    if isinstance(value, (list, tuple, set)):
        items = [_plain(v, storages, f"{name}.{i}", mark) for i, v in enumerate(value)]
        return type(value)(items) if type(value) in (list, tuple, set) else tuple(items)
    if isinstance(value, torch.dtype):
        return GlobalRef("torch", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        args = (value.type,) if value.index is None else (value.type, value.index)
        return Reduced(GlobalRef("torch", "device"), args)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        return storages.ref(torch.from_numpy(value.copy()), name)
    if callable(getattr(value, "state_dict", None)):
        return _plain(value.state_dict(), storages, name, mark)
    raise CheckpointError(
        f"{name or 'the object'} is a {type(value).__module__}.{type(value).__qualname__}: only tensors, plain data "
        "and objects with state_dict are saved (for a Namespace or dataclass, save vars(it))",
        name=name,
    )


def _plain_mapping(value: Mapping[Any, Any], storages: Storages, name: str, mark: dict[str, Any]) -> Any:
    items = ((k, _plain(v, storages, f"{name}.{k}" if name else str(k), mark)) for k, v in value.items())
    if not isinstance(value, OrderedDict):
        return dict(items)
    held: OrderedDict[Any, Any] = OrderedDict(items)
    metadata = getattr(value, "_metadata", None)
    if isinstance(metadata, Mapping):
        held._metadata = OrderedDict((k, dict(v)) for k, v in metadata.items())  # type: ignore[attr-defined]
    return held


def _safetensors(obj: Any, file: BinaryIO) -> None:
    mark: dict[str, Any] = {"anycard": 1}
    if isinstance(obj, nn.Module):
        state, wrappers = state_of(obj)
        if wrappers:
            mark["wrappers"] = wrappers
        versions = {p: m["version"] for p, m in getattr(state, "_metadata", {}).items() if m.get("version", 1) != 1}
        if versions:
            mark["versions"] = versions
    elif isinstance(obj, Mapping):
        state = OrderedDict(obj)
    else:
        raise TypeError(f"save takes a module or a dict of tensors, not a {type(obj).__name__}")
    rows, ties = _rows(state)
    import json

    metadata = {"anycard": json.dumps(mark, sort_keys=True, separators=(",", ":"))}
    write_safetensors(file, rows, {**metadata, **ties}, DEFAULT, ties=ties)


def _rows(state: Mapping[str, Any]) -> tuple[list[tuple[str, str, tuple[int, ...], Piece]], dict[str, str]]:
    rows: list[tuple[str, str, tuple[int, ...], Piece]] = []
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}: safetensors holds tensors only; save as .pt or .pth", name=name
            )
        _refuse_kinds(tensor, name)
        place = _identity(tensor)
        if place in first:
            ties[name] = first[place]
            continue
        first[place] = name
        dtype = FROM_TORCH[tensor.dtype]
        if DTYPES[dtype].safetensors is None:
            raise CheckpointError(f"{name}: safetensors has no {dtype}; save as .pt or .pth", name=name)
        rows.append((name, dtype, tuple(tensor.shape), _lazy(tensor)))
    return rows, ties


def _lazy(tensor: torch.Tensor) -> Piece:
    nbytes = tensor.numel() * tensor.element_size()
    return Lazy(nbytes, lambda: dense_bytes(tensor, row_major_order=True))
