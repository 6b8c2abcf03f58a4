"""Pickle a whole model: out of its wrappers, on the CPU, reproducibly; the model itself is not changed."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import torch
from torch import nn

from anycard.disk.pieces import Piece
from anycard.errors import CheckpointError
from anycard.names.paths import join
from anycard.pickles.depth import deeply
from anycard.pickles.writer import PROTOCOL, TensorRef, TorchPickler
from anycard.torch.dtypes import PLAIN
from anycard.torch.modules import live_wrapper, unwrapped, walk
from anycard.torch.storages import SharedStorages, Storages, all_of, refuse_kinds
from anycard.warning import warn

_COMPILED = "_is_torch_compile"
_OF_BUFFERS = {"persistent", "_is_buffer"}  # what nn.Buffer puts there; the module knows it too


class _ModelPickler(TorchPickler):
    """Wrappers give their inner module; tensors go to the archive's storages."""

    identities = (torch.Tensor, nn.Module)

    def __init__(self, file: io.BytesIO, storages: Storages) -> None:
        super().__init__(file)
        self.storages = storages
        self.devices: list[str] = []
        self.lost: list[str] = []

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write one object."""
        if isinstance(obj, torch.Tensor):
            self.lost += vars(obj).keys() - _OF_BUFFERS if hasattr(obj, "__dict__") else ()
            self.lost += () if type(obj) in PLAIN else (f"the class {type(obj).__name__}",)
            obj = self.storages.ref(obj, type(obj).__name__)
        elif isinstance(obj, nn.Module):
            _refuse_more(obj, "")
        elif isinstance(obj, torch.UntypedStorage):
            raise CheckpointError("an UntypedStorage, which torch loads as another class: keep a tensor of it")
        elif isinstance(obj, torch.TypedStorage):
            self.storage(self.storages.ref(all_of(obj), "a storage"))
            return
        elif isinstance(obj, torch.device) and obj.type != "cpu":
            self.devices.append(str(obj))
        super().save(self.stands_for(obj), save_persistent_id)

    def save_reduce(self, func: Any, args: Any, *more: Any, obj: Any = None, **rest: Any) -> None:
        """A module's state without what `torch.compile` leaves in the one that it wraps."""
        state = more[0] if more else None
        if isinstance(obj, nn.Module) and isinstance(state, dict) and _COMPILED in state:
            more = ({name: value for name, value in state.items() if name != _COMPILED}, *more[1:])
        super().save_reduce(func, args, *more, obj=obj, **rest)

    def stands_for(self, obj: Any) -> Any:
        """A module for what wraps it; a known tensor's reference."""
        if isinstance(obj, torch.Tensor):
            return self.storages.known(obj) or obj
        return unwrapped(obj) if isinstance(obj, nn.Module) else obj


def pickle_whole(model: nn.Module) -> tuple[bytes, list[Piece], dict[str, Any]]:
    """The pickle of a whole model, its storages and anycard's own record.

    Raises:
        CheckpointError: Something in it cannot be pickled; named by its path of attributes.
    """
    for path, _, module in walk(model):
        _refuse_more(module, path)
    try:
        data, pickler = deeply(partial(_pickled, model))
    except RecursionError as error:
        raise _named(error, model) from error
    if pickler.devices:
        warn(f"the model keeps {', '.join(sorted(set(pickler.devices)))} as an attribute; it stays in the file")
    if pickler.lost:
        warn(f"what tensors carry is not in the file: {', '.join(sorted(set(pickler.lost)))}")
    return data, pickler.storages.pieces, {"anycard": 1, "whole": True, **_versions(model)}


def _pickled(model: nn.Module) -> tuple[bytes, _ModelPickler]:
    storages = SharedStorages()
    _dumped(model, _Noting(storages))  # which parts of which storages are in use is known only at the end
    return _dumped(model, storages)


def _versions(model: nn.Module) -> dict[str, Any]:
    """The paths of all modules in the order of a state dict's `_metadata`, and what it says other than version 1.

    A class keeps its version, a pickle names only the class: who reads no class learns it here.
    """
    told = {path: {"version": getattr(module, "_version", 1)} for _, path, module in walk(unwrapped(model))}
    return {"modules": list(told), "metadata": {path: held for path, held in told.items() if held != {"version": 1}}}


class _Noting(Storages):
    """The first of two passes: it only tells the other which tensors there are."""

    def __init__(self, storages: SharedStorages) -> None:
        super().__init__()
        self._storages = storages

    def ref(self, tensor: torch.Tensor, name: str) -> TensorRef:
        made = super().ref(tensor, name)  # refuses what has no memory to note
        self._storages.note(tensor)
        return made


def _dumped(model: nn.Module, storages: Storages) -> tuple[bytes, _ModelPickler]:
    out = io.BytesIO()
    pickler = _ModelPickler(out, storages)
    try:
        pickler.dump(unwrapped(model))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # whatever an object's own `__reduce__` raises
        raise _named(error, model) from error
    return out.getvalue(), pickler


def _named(error: Exception, model: nn.Module) -> CheckpointError:
    """What went wrong, with the path of the first thing that cannot be pickled by itself."""
    for path, _, module in walk(unwrapped(model)):
        try:
            for name, value in {**module._parameters, **module._buffers, **vars(module)}.items():
                where = join(path, name)
                if name not in ("_modules", "_parameters", "_buffers"):
                    _try(value, where)
            where = path or type(module).__name__
            _ModelPickler(io.BytesIO(), Storages()).dump(type(module))
            module.__reduce_ex__(PROTOCOL)
        except Exception as found:  # noqa: BLE001 - whatever its class raises
            return _refusal(where, found)
    return _refusal(type(unwrapped(model)).__name__, error)


def _try(value: Any, where: str) -> None:
    if isinstance(value, torch.Tensor):
        refuse_kinds(value, where)
    else:
        _ModelPickler(io.BytesIO(), Storages()).dump(value)


def _refusal(where: str, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        text = str(error.args[0])
        return CheckpointError(text if text.startswith(where) else f"{where}: {text}", name=where)
    if isinstance(error, RecursionError):
        return CheckpointError(f"{where} is nested too deep to be pickled", name=where)
    return CheckpointError(f"{where} cannot be pickled: {type(error).__name__}: {error}", name=where)


def _refuse_more(module: nn.Module, path: str) -> None:
    """CheckpointError for a wrapper with tensors or modules beside the module that it wraps: they would be lost."""
    row = live_wrapper(module)
    inner = module._modules.get(row.child) if row is not None else None
    if row is None or inner is None:
        return
    inside = set(map(id, inner.modules()))
    own = [name for name, held in module._modules.items() if held is not None and id(held) not in inside]
    tensors = {**module._parameters, **module._buffers}
    own += [name for name, held in tensors.items() if held is not None and name not in row.own]
    if own:
        raise CheckpointError(
            f"{path or 'the model'} is a {type(module).__name__}, a wrapper that goes from whole models, but has "
            f"{', '.join(own)} of its own, which would be lost: save its weights (whole=False), or the module in it",
            name=join(path, own[0]),
        )
