"""Write the pickles that torch reads, without torch. Source: torch/_tensor.py, torch/serialization.py."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from anycard.tensors import DTYPES


@dataclass(frozen=True)
class GlobalRef:
    """A class or function, by name; never imported."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Reduced:
    """A call that the reader makes."""

    callee: GlobalRef
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor in a storage of the archive; `storage_numel` and strides in elements."""

    storage_key: str
    dtype: str
    device: str
    storage_numel: int
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    parameter: bool = False


@dataclass(frozen=True, eq=False)
class _Persistent:
    pid: tuple[Any, ...]


class TorchPickler(pickle._Pickler):
    """Protocol 2, as torch writes it; the bytes do not depend on which equal strings are one object."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self._strings: dict[str, str] = {}
        self._globals: dict[GlobalRef, GlobalRef] = {}
        self._alive: list[Any] = []  # the memo goes by id: nothing may die before the end

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write one object."""
        kind = type(obj)
        self._alive.append(obj)
        if kind is str:
            obj = self._strings.setdefault(obj, obj)
        elif kind is GlobalRef:
            self._save_global_ref(self._globals.setdefault(obj, obj))
            return
        elif kind is TensorRef:
            self._save_once(obj, lambda: self._tensor(obj))
            return
        elif kind is Reduced:
            self._save_once(obj, lambda: self._reduce(obj.callee, obj.args))
            return
        elif kind is _Persistent:
            self.save(obj.pid)
            self.write(pickle.BINPERSID)
            return
        elif kind is set:
            self._reduce(GlobalRef("__builtin__", "set"), (sorted(obj, key=repr),))
            return
        elif kind is OrderedDict:
            self._save_once(obj, lambda: self._ordered(obj))
            return
        super().save(obj, save_persistent_id)

    def _save_once(self, obj: Any, write: Any) -> None:
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(self.get(known[0]))
            return
        write()
        self.memoize(obj)

    def _save_global_ref(self, ref: GlobalRef) -> None:
        self._save_once(ref, lambda: self.write(f"c{ref.module}\n{ref.name}\n".encode()))

    def _reduce(self, callee: GlobalRef, args: tuple[Any, ...]) -> None:
        self.save(callee)
        self.save(args)
        self.write(pickle.REDUCE)

    def _ordered(self, obj: OrderedDict[Any, Any]) -> None:
        self._reduce(GlobalRef("collections", "OrderedDict"), ())
        self._batch_setitems(obj.items())  # type: ignore[attr-defined]
        state = obj.__dict__
        if state:
            self.save(dict(sorted(state.items())))
            self.write(pickle.BUILD)

    def _tensor(self, ref: TensorRef) -> None:
        if ref.parameter:
            bare = TensorRef(
                ref.storage_key, ref.dtype, ref.device, ref.storage_numel, ref.storage_offset, ref.shape, ref.stride
            )
            args = (bare, ref.requires_grad, OrderedDict())
            self._reduce(GlobalRef("torch._utils", "_rebuild_parameter"), args)
            return
        row = DTYPES[ref.dtype]
        kind = GlobalRef("torch", row.storage) if row.storage else GlobalRef("torch.storage", "UntypedStorage")
        count = ref.storage_numel if row.storage else ref.storage_numel * row.itemsize
        storage = _Persistent(("storage", kind, ref.storage_key, ref.device, count))
        common = (storage, ref.storage_offset, ref.shape, ref.stride, ref.requires_grad, OrderedDict())
        if row.storage:
            self._reduce(GlobalRef("torch._utils", "_rebuild_tensor_v2"), common)
        else:
            args = (*common, GlobalRef("torch", ref.dtype))
            self._reduce(GlobalRef("torch._utils", "_rebuild_tensor_v3"), args)


def dump(obj: Any) -> bytes:
    """The pickle of plain data, `TensorRef`, `GlobalRef` and `Reduced`."""
    out = io.BytesIO()
    pickler = TorchPickler(out)
    pickler.dump(obj)
    return out.getvalue()


__all__ = ["GlobalRef", "Reduced", "TensorRef", "TorchPickler", "dump"]
