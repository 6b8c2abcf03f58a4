"""The closed set of what a pickle may make: what torch writes into weights, and plain containers.

Everything else becomes an inert stub. A constructor takes the read's budget, then the pickle's arguments;
NotImplemented from it means a stub. Through `find_class` each is a plain callable class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

from anycard.errors import FormatError
from anycard.pickles.arrays import FollowedArray, bytes_of, from_buffer, reconstruct, scalar
from anycard.pickles.budget import Budget
from anycard.pickles.composite import COMPOSITES, OF_TYPE, ON_DEVICE, Composite, Packed, is_packed, rebuild_on_device
from anycard.pickles.stubs import Counted, Defaulting, Inert, Size, inert_class
from anycard.pickles.views import INTEGERS, Built, StoredStorage, ints, sized, view
from anycard.tensors import BY_STORAGE, DTYPES, Storage, TensorInfo, form_of


def rebuild_tensor(budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorInfo:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (…, requires_grad, hooks, metadata)."""
    if not isinstance(storage, StoredStorage) or storage.dtype is None:
        raise FormatError("a tensor without a typed storage")
    metadata = rest[2] if len(rest) > 2 else None
    return _make(budget, storage, storage.dtype, offset, size, stride, rest[:1] == (True,), metadata)


def rebuild_tensor_v3(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
    metadata: Any = None,
) -> TensorInfo:  # fmt: skip
    """torch._utils._rebuild_tensor_v3: an untyped storage, the dtype beside it."""
    if not isinstance(storage, StoredStorage):
        raise FormatError("a tensor without a storage")
    return _make(budget, storage, _dtype(dtype), offset, size, stride, grad is True, metadata)


def _dtype(dtype: Any) -> str:
    """The name of a `torch.float32` and kin."""
    if isinstance(dtype, type) and issubclass(dtype, Inert) and dtype.module == "torch" and dtype.name in DTYPES:
        return dtype.name
    raise FormatError("a tensor of a dtype that anycard does not know")


def _make(
    budget: Budget, stored: StoredStorage, dtype: str, offset: Any, size: Any, stride: Any, grad: bool, metadata: Any
) -> TensorInfo:
    if stored.storage is None:
        raise FormatError("a tensor of a storage that no persistent id names")
    if dtype in INTEGERS:
        raise FormatError(f"a {dtype} tensor without a scale")
    first = ints(budget, (offset,), "offset")[0]
    start = stored.start + first * DTYPES[dtype].itemsize
    bits = metadata if isinstance(metadata, dict) else {}
    return view(
        stored.storage, dtype, start, ints(budget, size, "shape"), ints(budget, stride, "stride"),
        requires_grad=grad, conj=bits.get("conj") is True, neg=bits.get("neg") is True,
    )  # fmt: skip


def rebuild_parameter(
    budget: Budget, data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None
) -> Any:
    """torch._utils._rebuild_parameter, and with state."""
    if not isinstance(data, TensorInfo):
        return data
    return data.replace(parameter=True, requires_grad=requires_grad is True)


def parameter(budget: Budget, data: Any = None, requires_grad: Any = True) -> Any:
    """The class called, as torch below 1.0 pickled parameters."""
    return rebuild_parameter(budget, data, requires_grad) if isinstance(data, TensorInfo) else NotImplemented


def variable(budget: Budget, data: Any = None, *rest: Any) -> Any:
    """torch.autograd.Variable below 0.4, and nn.Buffer: the tensor itself."""
    return data if isinstance(data, TensorInfo) else NotImplemented


class OldTensor(Built):
    """A tensor as torch below 0.2 pickled it: made empty, its BUILD brings (storage, offset, size, stride)."""

    budget: ClassVar[Budget]

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if type(state) is tuple and len(state) == 4 and isinstance(state[0], StoredStorage):
            self.result = rebuild_tensor(self.budget, *state)


def rebuild_from_type(budget: Budget, func: Any, kind: Any, args: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type, and _v2: a tensor with attributes, or of a subclass."""
    known = isinstance(func, type) and issubclass(func, Inert) and (func.module, func.name) in _REBUILDS
    if not known or type(args) is not tuple:
        return NotImplemented
    budget.spend(len(args))
    return func(*args)


def rebuild_meta(budget: Budget, dtype: Any, size: Any, stride: Any, requires_grad: Any = False) -> TensorInfo:
    """torch._utils._rebuild_meta_tensor_no_storage: a tensor without bytes."""
    shape, steps = ints(budget, size, "shape"), ints(budget, stride, "stride")
    sized(shape, steps)
    storage = Storage("meta", 0, device="meta", missing="it was saved from the meta device, without values")
    return TensorInfo(form_of(_dtype(dtype), shape, steps, requires_grad=requires_grad is True), storage)


def load_from_bytes(budget: Budget, data: Any) -> Any:
    """torch.storage._load_from_bytes: a whole torch file within a pickle, not looked for within another."""
    data = bytes_of(data) if isinstance(data, str) else data
    embedded = budget.embedded
    if not isinstance(data, bytes) or embedded is None:
        return NotImplemented
    budget.spend(len(data))
    budget.embedded = None
    try:
        return embedded.open(data)
    finally:
        budget.embedded = embedded


def same(budget: Budget, value: Any, *rest: Any) -> Any:
    """torch.jit._pickle's lists and tags of types: the value itself."""
    return value


def encode(budget: Budget, text: Any, codec: Any = "utf-8", *rest: Any) -> bytes:
    """_codecs.encode, as pickle protocol 2 spells bytes."""
    if not isinstance(text, str) or not isinstance(codec, str) or codec not in _CODECS:
        raise FormatError("bytes that are no text in a known codec")
    budget.spend(len(text))
    return text.encode(codec)


_CODECS = frozenset(["latin1", "latin-1", "utf-8", "utf8", "ascii"])


def reconstructor(budget: Budget, cls: Any, base: Any = None, state: Any = None) -> Any:
    """copyreg._reconstructor: an object made by `__new__`; `state` is what its builtin base holds."""
    if not isinstance(cls, type) or not issubclass(cls, Inert):
        raise FormatError("an object without a class")
    return cls.__new__(cls) if state is None else cls.__new__(cls, state)


def bound(budget: Budget, owner: Any, name: Any = "", *default: Any) -> Any:
    """getattr, never run: the forgotten call `(module, "state_dict")` is read as the module."""
    return owner if isinstance(owner, Inert) and isinstance(name, str) and name == "state_dict" else NotImplemented


def _held(budget: Budget, args: tuple[Any, ...], what: str, cost: int = 1) -> Any:
    """The container that a container is made of; an entry costs more where it is hashed."""
    held: Any = args[0] if args else ()
    if not isinstance(held, (list, tuple, set, frozenset, dict)):
        raise FormatError(f"a {what} is made of a {type(held).__name__}")
    budget.spend(cost * len(held))
    return held


def _list(budget: Budget, *args: Any) -> list[Any]:
    return list(_held(budget, args, "list"))


def _tuple(budget: Budget, *args: Any) -> tuple[Any, ...]:
    return tuple(_held(budget, args, "tuple"))


def _members(budget: Budget, args: tuple[Any, ...]) -> Any:
    held = _held(budget, args, "set", 4)
    made: set[Any] = set()
    for member in held:
        budget.keep(member, made)
    return made


def _set(budget: Budget, *args: Any) -> set[Any]:
    return set(_members(budget, args))


def _frozenset(budget: Budget, *args: Any) -> frozenset[Any]:
    return frozenset(_members(budget, args))


def _pairs(budget: Budget, args: tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    """Items of the dict, or of the list of pairs, that a dict is made of."""
    held = _held(budget, args, "dict", 8)
    made: dict[Any, Any] = {}
    for pair in held.items() if isinstance(held, dict) else held:
        if type(pair) not in (tuple, list) or len(pair) != 2:
            raise FormatError("a dict is made of what are no pairs")
        budget.keep(pair[0], made, pair[1])
    return made.items()


def _dict(budget: Budget, *args: Any) -> dict[Any, Any]:
    return dict(_pairs(budget, args))


def _ordered(budget: Budget, *args: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(_pairs(budget, args))


def _counter(budget: Budget, *args: Any) -> Any:
    """collections.Counter of its counts; of anything else it would have to count."""
    return Counted(_pairs(budget, args)) if not args or isinstance(args[0], dict) else NotImplemented


def _defaultdict(budget: Budget, factory: Any = None, *args: Any) -> Defaulting:
    made = Defaulting(_pairs(budget, args))
    made.factory = factory
    return made


def _size(budget: Budget, *args: Any) -> Size:
    held = _held(budget, args, "torch.Size")
    if any(type(size) is not int for size in held):
        raise FormatError("a torch.Size is made of what are no integers")
    return Size(held)


def _bytes(budget: Budget, *args: Any) -> bytes:
    """bytes, of text in a codec or of bytes; a size would allocate what the file merely claims."""
    held = args[0] if args else b""
    if isinstance(held, str):
        return encode(budget, held, *(args[1:] or ("latin1",)))
    if not isinstance(held, (bytes, bytearray)):
        raise FormatError(f"bytes are made of a {type(held).__name__}")
    budget.spend(len(held))
    return bytes(held)


def _bytearray(budget: Budget, *args: Any) -> bytearray:
    return bytearray(_bytes(budget, *args))


def _number(make: Callable[..., Any], most: int, budget: Budget, *args: Any) -> Any:
    """A number or text out of numbers and text: the text of a container could be endless."""
    if len(args) > most or any(type(a) not in (str, int, float, bool, complex) for a in args):
        raise FormatError(f"a {make.__name__} is made of what is no number and no text")
    budget.spend(sum(len(a) for a in args if isinstance(a, str)))
    return make(*args)


_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": _set, "frozenset": _frozenset, "list": _list, "dict": _dict, "tuple": _tuple,
    "bytes": _bytes, "bytearray": _bytearray, "getattr": bound, "complex": partial(_number, complex, 2),
    "int": partial(_number, int, 1), "float": partial(_number, float, 1),
    "str": partial(_number, str, 1), "bool": partial(_number, bool, 1),
}  # fmt: skip
_REBUILDS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
}
_TABLE: dict[tuple[str, str], Callable[..., Any]] = {
    **_REBUILDS,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _counter,
    ("collections", "defaultdict"): _defaultdict,
    ("_codecs", "encode"): encode,
    ("copyreg", "_reconstructor"): reconstructor,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): rebuild_meta,
    **dict.fromkeys(OF_TYPE, rebuild_from_type),
    ("torch.nn.parameter", "Parameter"): parameter,
    ("torch.nn.parameter", "Buffer"): variable,
    ("torch.autograd.variable", "Variable"): variable,
    ("torch", "Size"): _size,
    ("torch.torch_version", "TorchVersion"): partial(_number, str, 1),
}
_TABLE.update({("builtins", _name): _make_it for _name, _make_it in _BUILTINS.items()})
for _module in ("numpy.core", "numpy._core"):
    _TABLE[f"{_module}.multiarray", "_reconstruct"] = reconstruct
    _TABLE[f"{_module}.multiarray", "scalar"] = scalar
    _TABLE[f"{_module}.numeric", "_frombuffer"] = from_buffer
_JOBLIB = ("joblib.numpy_pickle", "sklearn.externals.joblib.numpy_pickle")
_TABLE.update(dict.fromkeys(ON_DEVICE, rebuild_on_device))
for _name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag"):
    _TABLE["torch.jit._pickle", _name] = same
_OLD = frozenset(["Tensor", *(name.replace("Storage", "Tensor") for name in BY_STORAGE)])
_UNTYPED = frozenset(["UntypedStorage", "TypedStorage", "_UntypedStorage", "_TypedStorage"])


class Globals:
    """`find_class` for one read: one inert class for each name, which makes what is known of it."""

    def __init__(self, budget: Budget) -> None:
        self.seen: dict[tuple[str, str], type[Inert]] = {}
        self._budget = budget

    def find_class(self, module: str, name: str) -> type[Inert]:
        """What the pickle gets for a global."""
        found = self.seen.get((module, name))
        if found is None:
            if len(self.seen) >= self._budget.limits.globals:
                raise FormatError(f"the pickle names more than {self._budget.limits.globals:,} classes")
            found = self.seen[module, name] = self._stand_in(module, name)
        return found

    def _stand_in(self, module: str, name: str) -> type[Inert]:
        if module in ("torch", "torch.cuda", "torch.storage"):
            if name in _UNTYPED:
                return inert_class(module, name, StoredStorage)
            if name in BY_STORAGE:
                return inert_class(module, name, StoredStorage, dtype=BY_STORAGE[name].name)
            if name in _OLD:
                return inert_class(module, name, OldTensor, budget=self._budget)
        if self._budget.embedded is not None:
            if (module, name) == ("torch.storage", "_load_from_bytes"):
                return inert_class(module, name, make=partial(load_from_bytes, self._budget))
            if name == "NumpyArrayWrapper" and module in _JOBLIB:
                return inert_class(module, name, FollowedArray)
        known = _TABLE.get((module, name))
        make = None if known is None else partial(known, self._budget)
        if is_packed(module, name):
            return inert_class(module, name, Packed, budget=self._budget)
        if (module, name) in COMPOSITES:
            return inert_class(module, name, Composite, make=make, budget=self._budget)
        return inert_class(module, name, make=make)
