"""Tensors that are no plain memory: sparse, quantised, nested, subclasses. They are listed by their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from anycard.pickles.brief import key_text
from anycard.pickles.budget import Budget
from anycard.pickles.stubs import Inert
from anycard.pickles.views import INTEGERS, StoredStorage, ints, view
from anycard.tensors import DTYPES, Storage, TensorInfo

_COMPRESSED = {
    "sparse_csr": ("crow_indices", "col_indices"), "sparse_bsr": ("crow_indices", "col_indices"),
    "sparse_csc": ("ccol_indices", "row_indices"), "sparse_bsc": ("ccol_indices", "row_indices"),
}  # fmt: skip
_SCRIPTED = {1: ("indices",), 2: ("crow_indices", "col_indices")}  # c10/core/Layout.h; TorchScript writes no others


class Composite(Inert):
    """A tensor made of others.

    Attributes:
        parts: Name -> tensor or plain value; None where the call is not as torch writes it.
        why: Why there is no plain tensor.
    """

    budget: ClassVar[Budget]
    parts: Mapping[str, Any] | None = None
    why: str = ""

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        if isinstance(self, Composite):
            self.why, make = _MAKERS[cls.module, cls.name]
            self.parts = make(cls.budget, args)
        return self


class Packed(Composite):
    """Parameters that a quantised module packs for its kernels: a ScriptObject, whose BUILD brings the tensors."""

    why = "packed parameters: given by the tensors that they are made from"

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Any:
        return Inert.__new__(cls, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state
        named = type(state) is tuple and len(state) == 2 and type(state[1]) is str  # Python's pickles add the class
        self.parts = dict(_tensors_in(self.budget, state[0] if named else state)) or None


def is_packed(module: str, name: str) -> bool:
    """The class of such an object, as Python's pickles and TorchScript's call it."""
    return (module, name) == ("torch", "ScriptObject") or module.startswith("__torch__.torch.classes.")


def _tensors_in(budget: Budget, held: Any, path: str = "", levels: int = 4) -> Iterator[tuple[str, Any]]:
    """Tensors, and the parts of such as are made of parts, in tuples and lists."""
    if isinstance(held, TensorInfo):
        yield path or "0", held
    elif isinstance(held, Composite) and held.parts is not None:
        yield from ((f"{path}.{name}" if path else name, part) for name, part in held.parts.items())
    elif isinstance(held, (tuple, list)) and levels:
        budget.spend(len(held))
        for index, value in enumerate(held):
            yield from _tensors_in(budget, value, f"{path}.{index}" if path else str(index), levels - 1)


def _sparse(budget: Budget, args: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """(layout, (indices, values, size, coalesced)), or (layout, (compressed, plain, values, size))."""
    if len(args) > 4 and type(args[0]) is int:
        return _scripted_sparse(args)
    if len(args) != 2 or type(args[1]) is not tuple or len(args[1]) not in (3, 4):
        return None
    layout = args[0].args[0] if isinstance(args[0], Inert) and args[0].args else None
    names = _COMPRESSED.get(layout.removeprefix("torch.")) if isinstance(layout, str) else None
    if names is not None and len(args[1]) == 4:
        return dict(zip((*names, "values", "size"), args[1], strict=True))
    return dict(zip(("indices", "values", "size", "is_coalesced"), args[1], strict=False))


def _scripted_sparse(args: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """As TorchScript has it: (layout's number, size, requires_grad, …, values, hooks)."""
    names = _SCRIPTED.get(args[0])
    if names is None or len(args) < len(names) + 4:
        return None
    return dict(zip((*names, "values", "size"), (*args[3 : len(names) + 4], args[1]), strict=True))


def _quantised(budget: Budget, args: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """(storage, offset, size, stride, (scheme, scale, zero point), …), or with scales, zero points and an axis."""
    if len(args) < 5 or not isinstance(args[0], StoredStorage) or type(args[4]) is not tuple:
        return None
    stored, scheme = args[0], args[4]
    dtype = type(stored).dtype or ""
    if stored.storage is None or dtype not in INTEGERS or len(scheme) not in (3, 4):
        return None
    names = ("scale", "zero_point") if len(scheme) == 3 else ("scales", "zero_points", "axis")
    size, stride = ints(budget, args[2], "shape"), ints(budget, args[3], "stride")
    scales = dict(zip(names, scheme[1:], strict=True))
    if dtype in ("quint4x2", "quint2x4"):  # several elements a byte
        return {"packed": stored.args[0], "size": size, **scales}
    start = stored.start + ints(budget, (args[1],), "offset")[0] * DTYPES[dtype].itemsize
    return {"int_repr": view(stored.storage, INTEGERS[dtype], start, size, stride), **scales}


def _nested(budget: Budget, args: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """(values, sizes, strides, offsets)."""
    return dict(zip(("values", "sizes", "strides", "offsets"), args, strict=True)) if len(args) == 4 else None


def _subclass(budget: Budget, args: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """(function, class, its arguments, state): the tensors that the object keeps."""
    state = args[3] if len(args) == 4 else None
    parts: dict[str, Any] = {}
    # A dict of attributes, or beside them the slots' own, or what a `__getstate__` made.
    for index, held in enumerate(state if type(state) is tuple else (state,)):
        budget.spend(len(held) if isinstance(held, dict) else 1)
        parts.update({key_text(n): v for n, v in held.items()} if isinstance(held, dict) else {str(index): held})
    parts = {name: value for name, value in parts.items() if value is not None}
    return parts if any(isinstance(value, (TensorInfo, Composite)) for value in parts.values()) else None


def _elsewhere(budget: Budget, args: tuple[Any, ...]) -> Mapping[str, Any] | None:
    """(data, dtype, device, requires_grad), the data of another dtype than the tensor."""
    return dict(zip(("data", "dtype", "device", "requires_grad"), args, strict=True)) if len(args) == 4 else None


def rebuild_on_device(budget: Budget, data: Any, dtype: Any = None, device: Any = None, grad: Any = False) -> Any:
    """torch._utils._rebuild_device_tensor_from_numpy and _from_cpu_tensor, for accelerators without storages."""
    known = isinstance(dtype, type) and issubclass(dtype, Inert) and dtype.module == "torch"
    if not isinstance(data, TensorInfo) or not known or data.dtype != dtype.name or not isinstance(device, str):
        return NotImplemented
    held = data.storage
    storage = Storage(
        "device", held.nbytes, device, held.source, held.offset, held.data, held.crc, held.big_endian, held.missing
    )
    return data.replace(storage=storage, requires_grad=grad is True)


# torch.tensor was torch._tensor's name until 1.9.
OF_TYPE = [(f"torch.{module}", f"_rebuild_from_type{end}") for module in ("_tensor", "tensor") for end in ("", "_v2")]
_SUBCLASS = "a tensor subclass: given by the tensors that it keeps"
_DEVICE = "a tensor of an accelerator, whose data was saved in another dtype"
_Maker = Callable[[Budget, "tuple[Any, ...]"], "Mapping[str, Any] | None"]
_MAKERS: dict[tuple[str, str], tuple[str, _Maker]] = {
    ("torch._utils", "_rebuild_sparse_tensor"): ("a sparse tensor: given by its indices and values", _sparse),
    ("torch._utils", "_rebuild_qtensor"): ("a quantised tensor: given by its integers and scales", _quantised),
    ("torch._utils", "_rebuild_nested_tensor"): ("a nested tensor: given by its values and sizes", _nested),
    **dict.fromkeys(OF_TYPE, (_SUBCLASS, _subclass)),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): (_DEVICE, _elsewhere),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): (_DEVICE, _elsewhere),
    ("torch._utils", "_rebuild_xla_tensor"): (_DEVICE, _elsewhere),
}
COMPOSITES = frozenset(_MAKERS)
ON_DEVICE = frozenset(key for key, value in _MAKERS.items() if value[0] is _DEVICE)
