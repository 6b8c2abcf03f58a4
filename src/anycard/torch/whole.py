"""Pickle a whole model: out of its wrappers, on the CPU, reproducibly; the model itself is not changed."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn

from anycard.disk.pieces import Piece
from anycard.errors import CheckpointError
from anycard.pickles.writer import TensorRef, TorchPickler
from anycard.torch.dtypes import PLAIN
from anycard.torch.modules import unwrapped
from anycard.torch.storages import SharedStorages, Storages
from anycard.warning import warn

_OF_BUFFERS = {"persistent", "_is_buffer"}  # what nn.Buffer puts there; the module knows it too


class _ModelPickler(TorchPickler):
    """Wrappers give their inner module; tensors go to the archive's storages."""

    identities = (torch.Tensor, nn.Module)

    def __init__(self, file: io.BytesIO, storages: Storages) -> None:
        super().__init__(file)
        self.storages = storages
        self.path: list[str] = []
        self.devices: list[str] = []
        self.lost: list[str] = []

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write one object."""
        if isinstance(obj, torch.Tensor):
            self.lost += vars(obj).keys() - _OF_BUFFERS if hasattr(obj, "__dict__") else ()
            self.lost += () if type(obj) in PLAIN else (f"the class {type(obj).__name__}",)
            obj = self.storages.ref(obj, type(obj).__name__)
        elif isinstance(obj, torch.device) and obj.type != "cpu":
            self.devices.append(str(obj))
        super().save(self.stands_for(obj), save_persistent_id)

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
    storages = SharedStorages()
    _dumped(model, _Noting(storages))  # which parts of which storages are in use is known only at the end
    data, pickler = _dumped(model, storages)
    if pickler.devices:
        warn(f"the model keeps {', '.join(sorted(set(pickler.devices)))} as an attribute; it stays in the file")
    if pickler.lost:
        warn(f"what tensors carry is not in the file: {', '.join(sorted(set(pickler.lost)))}")
    return data, storages.pieces, {"anycard": 1, "whole": True}


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
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:  # RuntimeError: parametrised ones
        where = _culprit(model)
        raise CheckpointError(f"{where} cannot be pickled: {error}", name=where) from error
    return out.getvalue(), pickler


def _culprit(model: nn.Module) -> str:
    """The path of the first attribute that cannot be pickled by itself."""
    for path, module in unwrapped(model).named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                _ModelPickler(io.BytesIO(), Storages()).dump(value)
            except Exception:  # noqa: BLE001 - whatever its class raises
                return f"{path}.{name}" if path else name
    return type(unwrapped(model)).__name__
