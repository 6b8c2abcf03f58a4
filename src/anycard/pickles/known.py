"""The closed set of what a pickle may make: what torch writes into weights, and plain containers.

Everything else becomes an inert stub. Constructors are plain callables, usable through `find_class`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits
from anycard.pickles.stubs import Inert, inert_class
from anycard.tensors import BY_NUMPY, BY_STORAGE, DTYPES, Storage, TensorInfo, row_major, span_numel


class StorageClass(NamedTuple):
    """A storage class that a persistent id names; dtype None for untyped."""

    dtype: str | None


class StorageRef(NamedTuple):
    """What a persistent id gives: a storage, its dtype, and the first byte that it means."""

    storage: Storage
    dtype: str | None
    start: int


class DTypeStub:
    """A numpy dtype on its way through REDUCE and BUILD."""

    def __init__(self, code: Any, *rest: Any) -> None:
        self.code = str(code)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str):
            self.order = state[1]


class ArrayStub:
    """A numpy array on its way through REDUCE and BUILD; `result` is the tensor, once known."""

    def __init__(self, *args: Any) -> None:
        self.result: TensorInfo | None = None
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            if isinstance(data, str):
                data = data.encode("latin1")
            if isinstance(dtype, DTypeStub) and isinstance(data, (bytes, bytearray)):
                self.result = _array(shape, dtype, bool(fortran), bytes(data))


def _array(shape: Any, dtype: DTypeStub, fortran: bool, data: bytes) -> TensorInfo | None:
    row = BY_NUMPY.get(dtype.code)
    if row is None or not isinstance(shape, tuple):
        return None
    sizes = _ints(shape, "shape")
    stride = tuple(reversed(row_major(tuple(reversed(sizes))))) if fortran else row_major(sizes)
    storage = Storage("array", len(data), data=data, big_endian=dtype.order == ">")
    return _view(storage, row.name, 0, sizes, stride)


def _ints(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > DEFAULT.rank:
        raise FormatError(f"a tensor's {what} is {type(values).__name__} or has too many dimensions")
    if not all(type(v) is int and 0 <= v < 1 << 62 for v in values):
        raise FormatError(f"a tensor's {what} {str(values)[:80]} is not made of non-negative integers")
    return tuple(values)


def _view(
    storage: Storage, dtype: str, start: int, shape: tuple[int, ...], stride: tuple[int, ...], **more: Any
) -> TensorInfo:
    if len(shape) != len(stride):
        raise FormatError(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    end = start + span_numel(shape, stride) * DTYPES[dtype].itemsize
    if end > storage.nbytes and 0 not in shape:
        raise FormatError(
            f"a tensor ({dtype}, {' x '.join(map(str, shape))}) needs {end:,} bytes of storage {storage.key}, "
            f"which has {storage.nbytes:,}"
        )
    return TensorInfo(dtype, shape, storage, stride=stride, start=start, **more)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorInfo:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (…, requires_grad, hooks, metadata)."""
    if not isinstance(storage, StorageRef) or storage.dtype is None:
        raise FormatError("a tensor without a typed storage")
    metadata = rest[2] if len(rest) > 2 else None
    return _make(storage, storage.dtype, offset, size, stride, rest[:1] == (True,), metadata)


def rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorInfo:
    """torch._utils._rebuild_tensor_v3: an untyped storage, the dtype beside it."""
    name = getattr(dtype, "name", "")
    if not isinstance(storage, StorageRef) or name not in DTYPES:
        raise FormatError(f"a tensor of dtype {name or dtype!r} that anycard does not know")
    return _make(storage, name, offset, size, stride, grad is True, metadata)


def _make(ref: StorageRef, dtype: str, offset: Any, size: Any, stride: Any, grad: bool, metadata: Any) -> TensorInfo:
    first = _ints((offset,), "offset")[0]
    bits = metadata if isinstance(metadata, dict) else {}
    return _view(
        ref.storage, dtype, ref.start + first * DTYPES[dtype].itemsize, _ints(size, "shape"), _ints(stride, "stride"),
        requires_grad=grad, conj=bits.get("conj") is True, neg=bits.get("neg") is True,
    )  # fmt: skip


def rebuild_parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> Any:
    """torch._utils._rebuild_parameter, and with state."""
    if not isinstance(data, TensorInfo):
        return data
    return data.replace(parameter=True, requires_grad=requires_grad is True)


def rebuild_from_type(func: Any, kind: Any, args: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass."""
    if func in (rebuild_tensor, rebuild_tensor_v3, rebuild_parameter) and isinstance(args, tuple):
        return func(*args)
    return inert_class("torch._tensor", "_rebuild_from_type_v2")(func, kind, args, state)


def rebuild_meta(dtype: Any, size: Any, stride: Any, requires_grad: Any = False) -> TensorInfo:
    """torch._utils._rebuild_meta_tensor_no_storage: a tensor without bytes."""
    name = getattr(dtype, "name", "")
    if name not in DTYPES:
        raise FormatError(f"a meta tensor of unknown dtype {name!r}")
    storage = Storage("meta", 0, device="meta", missing="it was saved from the meta device, without values")
    return TensorInfo(name, _ints(size, "shape"), storage, stride=_ints(stride, "stride"))


def encode(text: Any, codec: Any = "utf-8") -> bytes:
    """_codecs.encode, as pickle protocol 2 spells bytes."""
    if codec not in ("latin1", "latin-1", "utf-8", "utf8", "ascii") or not isinstance(text, str):
        raise FormatError(f"bytes in an unknown codec {codec!r}")
    return text.encode(codec)


def from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *rest: Any) -> Any:
    """numpy.core.numeric._frombuffer, as pickle protocol 5 spells arrays."""
    if isinstance(dtype, DTypeStub) and isinstance(data, (bytes, bytearray)):
        info = _array(shape, dtype, order == "F", bytes(data))
        if info is not None:
            return info
    return inert_class("numpy", "_frombuffer")(data, dtype, shape, order)


def scalar(dtype: Any, data: Any = b"") -> Any:
    """numpy.core.multiarray.scalar: a plain number, or a stub."""
    if isinstance(data, str):
        data = data.encode("latin1")
    info = _array((), dtype, False, data) if isinstance(dtype, DTypeStub) and isinstance(data, bytes) else None
    if info is None:
        return inert_class("numpy", "scalar")(dtype, data)
    import numpy as np

    order = ">" if info.storage.big_endian else "<"
    return np.frombuffer(data, dtype=dtype.code if dtype.code[1:] == "1" else order + dtype.code)[0].item()


def reconstructor(cls: Any, base: Any = None, state: Any = None) -> Any:
    """copyreg._reconstructor: an object made by `__new__`."""
    return cls.__new__(cls) if isinstance(cls, type) and issubclass(cls, Inert) else cls()


def bound(owner: Any, name: Any = "", *default: Any) -> Any:
    """getattr, never run: the forgotten call `(module, "state_dict")` is read as the module."""
    if name == "state_dict" and isinstance(owner, Inert):
        return owner
    return inert_class("builtins", "getattr")(owner, name, *default)


def _ordered(*args: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(*args[:1])


def _dict(*args: Any) -> dict[Any, Any]:
    held = [a for a in args if isinstance(a, (dict, list, tuple))]
    return dict(held[0]) if held else {}


def _bytes(*args: Any) -> bytes:
    """bytes, of text in latin1 or of bytes; a size would allocate what the file merely claims."""
    if args and isinstance(args[0], str):
        return encode(args[0], "latin1")
    if args and not isinstance(args[0], (bytes, bytearray)):
        raise FormatError(f"bytes are made from a {type(args[0]).__name__}")
    return bytes(*args[:1])


def _bytearray(*args: Any) -> bytearray:
    return bytearray(_bytes(*args))


def _device(*args: Any) -> Inert:
    return inert_class("torch", "device")(*args)


_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": set, "frozenset": frozenset, "bytearray": _bytearray, "complex": complex, "list": list, "dict": _dict,
    "tuple": tuple, "int": int, "long": int, "float": float, "str": str, "bool": bool, "bytes": _bytes,
    "getattr": bound,
}  # fmt: skip
_TABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _dict,
    ("_codecs", "encode"): encode,
    ("copyreg", "_reconstructor"): reconstructor,
    ("copy_reg", "_reconstructor"): reconstructor,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): rebuild_meta,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    ("torch", "Size"): tuple,
    ("numpy", "dtype"): DTypeStub,
    ("torch.storage", "UntypedStorage"): StorageClass(None),
    ("torch", "UntypedStorage"): StorageClass(None),
    ("torch.storage", "TypedStorage"): StorageClass(None),
}
for _module in ("builtins", "__builtin__"):
    _TABLE.update({(_module, _name): _make_it for _name, _make_it in _BUILTINS.items()})
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _TABLE[_module, "_reconstruct"] = ArrayStub
    _TABLE[_module, "scalar"] = scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _TABLE[_module, "_frombuffer"] = from_buffer
for _name, _row in BY_STORAGE.items():
    _TABLE["torch", _name] = StorageClass(_row.name)
    _TABLE["torch.cuda", _name] = StorageClass(_row.name)
CALLABLE = frozenset(id(v) for v in _TABLE.values() if not isinstance(v, StorageClass))


class Globals:
    """`find_class` for one read: known constructors, else one inert class for each name."""

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.seen: dict[tuple[str, str], Any] = {}
        self._most = limits.globals

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle gets for a global."""
        known = _TABLE.get((module, name))
        if known is not None:
            return known
        if (module, name) not in self.seen:
            if len(self.seen) >= self._most:
                raise FormatError(f"the pickle names more than {self._most:,} classes")
            self.seen[module, name] = inert_class(module, name)
        return self.seen[module, name]
