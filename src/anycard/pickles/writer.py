"""The pickle of a torch file, written without torch: same content, same bytes.

Python's own pickler in its Python form, because only that lets `save` put another object in one's place.
"""

from __future__ import annotations

import codecs
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from anycard.errors import CheckpointError
from anycard.pickles.depth import deeply
from anycard.tensors import DTYPES

PROTOCOL = 2

if TYPE_CHECKING:

    class _Pickler:
        """What typeshed leaves out of `pickle._Pickler`."""

        memo: dict[int, tuple[int, Any]]

        def __init__(self, file: BinaryIO, protocol: int) -> None: ...
        def dump(self, obj: Any) -> None: ...
        def save(self, obj: Any, save_persistent_id: bool = True) -> None: ...
        def write(self, data: bytes) -> None: ...
        def get(self, i: int) -> bytes: ...
        def put(self, idx: int) -> bytes: ...
        def memoize(self, obj: Any) -> None: ...
        def save_reduce(self, func: Any, args: Any, *more: Any, obj: Any = None, **rest: Any) -> None: ...

else:
    _Pickler = pickle._Pickler


@dataclass(frozen=True)
class GlobalRef:
    """A class or function by name; written without importing it."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Reduced:
    """The result of a call that the reader makes: `torch.Size((2, 3))`."""

    callable_ref: GlobalRef
    args: tuple[Any, ...]


COUNTER = GlobalRef("collections", "Counter")  # called with a dict of counts, as the reader of plain weights takes it


@dataclass(eq=False, slots=True)
class TensorRef:
    """A tensor whose bytes stand in a storage record. One object met twice is one tensor when read.

    Attributes:
        storage_key: The record's name below `data/`.
        dtype: torch's name (`"float32"`).
        device: The tag that the file carries.
        storage_numel: Elements of the dtype in the storage.
        storage_offset: Elements before the first.
        shape, stride: As torch counts them.
        requires_grad: As stored.
        parameter: Written as an `nn.Parameter`.
    """

    storage_key: str
    dtype: str
    device: str
    storage_numel: int
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    parameter: bool = False


class TorchPickler(_Pickler):
    """Writes plain data, the references above, and whatever pickle itself can; text and bytes by value.

    Attributes:
        identities: Classes whose objects equal only themselves, although they have a hash of their own.
    """

    identities: ClassVar[tuple[type, ...]] = ()

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, PROTOCOL)
        self._sorted: frozenset[int] = frozenset()  # elements that are being sorted; one may hold its set
        self._by_value: dict[Any, Any] = {}
        self._texts: dict[str, str] = {}
        self._gets: dict[Any, bytes] = {(): pickle.EMPTY_TUPLE}
        self._storages: dict[tuple[str, str, str, int], tuple[Any, ...]] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write one object; equal immutable ones become one object, whichever they were."""
        obj = self._canonical(obj)
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(self.get(known[0]))
        elif not self._save_special(obj):
            super().save(obj, save_persistent_id)

    def _canonical(self, obj: Any) -> Any:
        if type(obj) is str:
            return self._texts.setdefault(obj, obj)
        key = _value_key(obj)
        return obj if key is None else self._by_value.setdefault(key, obj)

    def _save_special(self, obj: Any) -> bool:
        kind = type(obj)
        if kind is GlobalRef:
            self._global(obj)
        elif kind is TensorRef:
            self._tensor(obj)
        elif kind is Reduced:
            self.reduce(obj.callable_ref, obj.args, obj)
        elif kind is bytes:
            self.reduce(GlobalRef("_codecs", "encode"), (codecs.decode(obj, "latin1"), "latin1"), obj)
        elif kind is set or kind is frozenset:
            self._set(obj)
        else:
            return False
        return True

    def save_reduce(self, func: Any, args: Any, *more: Any, obj: Any = None, **rest: Any) -> None:
        """Write what an object's `__reduce__` gave: of a set's subclass, its elements in order."""
        if isinstance(obj, (set, frozenset)) and type(obj).__reduce__ in _OF_SETS and len(args) == 1:
            args = (self.in_order(args[0]),)
        super().save_reduce(func, args, *more, obj=obj, **rest)

    def reduce(self, function: GlobalRef, args: tuple[Any, ...], obj: Any = None) -> None:
        """Write a call of `function` by name; `obj`, if given, is remembered as its result."""
        self.save(function)
        self.save(args)
        self.write(pickle.REDUCE)
        if obj is not None:
            self.memoize(obj)

    def _global(self, ref: GlobalRef) -> None:
        if "\n" in ref.module + ref.name or not ref.module or not ref.name:
            raise CheckpointError(f"{ref.module}.{ref.name} cannot be named in a pickle")
        self.write(pickle.GLOBAL + f"{ref.module}\n{ref.name}\n".encode())
        self.memoize(ref)

    def _set(self, obj: set[Any] | frozenset[Any]) -> None:
        self.reduce(GlobalRef("__builtin__", type(obj).__name__), (self.in_order(obj),), obj)

    def in_order(self, items: Iterable[Any]) -> list[Any]:
        """A set's elements in an order that does not depend on addresses or on the hash seed."""
        return sorted(items, key=self._order)

    def _order(self, item: Any) -> tuple[str, Any]:
        name = _path_of(type(item))
        if type(item) in (bool, int, str, bytes):
            return name, item
        return name, b"" if id(item) in self._sorted else _SortKey(self, item).made()

    def identity(self, item: Any) -> str | None:
        """Of what equals only itself, its name or where it was met before; None for a value."""
        if isinstance(item, (type, types.FunctionType, types.BuiltinFunctionType)):
            return f"{item.__module__}.{item.__qualname__}"
        bare = isinstance(item, self.identities)
        hashed: Any = type(item).__hash__
        if not bare and (item is None or hashed is not object.__hash__):
            return None
        known = self.memo.get(id(self.stands_for(item)))
        told = "" if bare or known is not None else item.__reduce_ex__(PROTOCOL)  # a dtype's is its name
        place = told if isinstance(told, str) else ""
        return f"{_path_of(type(item))} {place if known is None else format(known[0], '012')}"

    def is_new(self, item: Any) -> bool:
        """An object that was not met before and that has a state to tell it by."""
        named = isinstance(item, (type, types.FunctionType, types.BuiltinFunctionType, *self.identities))
        return not (named or id(item) in self.memo or isinstance(item.__reduce_ex__(PROTOCOL), str))

    def stands_for(self, obj: Any) -> Any:
        """What is written in an object's place."""
        return obj

    def _tensor(self, ref: TensorRef) -> None:
        if ref.parameter:
            data = replace(ref, requires_grad=False, parameter=False)
            no_hooks: OrderedDict[str, Any] = OrderedDict()
            rebuild, args = "_rebuild_parameter", (data, ref.requires_grad, no_hooks)
            self.reduce(GlobalRef("torch._utils", rebuild), args, ref)
            return
        if self._like_others(ref):
            return
        row = DTYPES[ref.dtype]
        self._again(_REBUILD if row.storage else _REBUILD_UNTYPED)
        self.write(pickle.MARK)
        self.storage(ref)
        self.save(ref.storage_offset)
        self._again(ref.shape)
        self._again(ref.stride)
        self.write(pickle.NEWTRUE if ref.requires_grad else pickle.NEWFALSE)
        self._again(OrderedDict)
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
        self.memoize(OrderedDict())
        if not row.storage:
            self.save(GlobalRef("torch", ref.dtype))
        self.write(pickle.TUPLE + pickle.REDUCE)
        self.memoize(ref)

    def _like_others(self, ref: TensorRef) -> bool:
        """Write a tensor in one step where all but its storage has been written before; the same bytes."""
        shared = (_REBUILD, "storage", _STORAGES.get(ref.dtype), ref.device, ref.shape, ref.stride, OrderedDict)
        gets = [get for get in map(self._gets.get, shared) if get is not None]
        spec = (ref.storage_key, ref.dtype, ref.device, ref.storage_numel)
        key = ref.storage_key
        if len(gets) < len(shared) or spec in self._storages or key in self._texts:
            return False
        rebuild, storage, kind, device, shape, stride, hooks = gets
        at, put, memo = len(self.memo), self.put, self.memo
        text = key.encode()
        self.write(b"".join((
            rebuild, b"((", storage, kind, b"X", len(text).to_bytes(4, "little"), text, put(at), device,
            _number(ref.storage_numel), b"t", put(at + 1), b"Q", _number(ref.storage_offset), shape, stride,
            pickle.NEWTRUE if ref.requires_grad else pickle.NEWFALSE, hooks, b")R", put(at + 2), b"tR", put(at + 3),
        )))  # fmt: skip
        self._texts[key] = key
        self._storages[spec] = spec
        for index, obj in enumerate((key, spec, OrderedDict(), ref), at):
            memo[id(obj)] = index, obj
        return True

    def storage(self, ref: TensorRef) -> None:
        """Write a tensor's storage alone."""
        row = DTYPES[ref.dtype]
        spec = (ref.storage_key, ref.dtype, ref.device, ref.storage_numel)
        known = self._storages.get(spec)
        if known is not None:
            self.write(self.get(self.memo[id(known)][0]) + pickle.BINPERSID)
            return
        self.write(pickle.MARK)
        self._again("storage")
        self._again(GlobalRef("torch", row.storage) if row.storage else _UNTYPED)
        self.save(ref.storage_key)
        self._again(ref.device)
        self.save(ref.storage_numel if row.storage else ref.storage_numel * row.itemsize)
        self.write(pickle.TUPLE)
        self._storages[spec] = spec
        self.memoize(spec)
        self.write(pickle.BINPERSID)

    def _again(self, obj: Any) -> None:
        """Write a text, name or shape that comes with every tensor: by its place in the memo, once it has one."""
        get = self._gets.get(obj)
        if get is not None:
            self.write(get)
            return
        self.save(obj)
        self._gets[obj] = self.get(self.memo[id(self._canonical(obj))][0])


class _SortKey(TorchPickler):
    """The pickle of a set's element, to sort it by: a value by what it holds, all else by its name or place.

    An element that has neither goes by its state, in which the like of it goes by its class.
    """

    def __init__(self, outer: TorchPickler, item: Any) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self._sorted = outer._sorted | {id(item)}
        self._outer = outer
        self._item = item

    def made(self) -> bytes:
        self.dump(self._item)
        return self._file.getvalue()

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        text = self.identity(obj)
        if obj is self._item and text is not None and not isinstance(self._outer, _SortKey) and self._outer.is_new(obj):
            text = None
        super().save(obj if text is None else text, save_persistent_id)

    def identity(self, item: Any) -> str | None:
        return self._outer.identity(item)


_OF_SETS = (set.__reduce__, frozenset.__reduce__)  # a class and a list of the elements


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


_REBUILD = GlobalRef("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = GlobalRef("torch._utils", "_rebuild_tensor_v3")
_UNTYPED = GlobalRef("torch.storage", "UntypedStorage")
_STORAGES = {row.name: GlobalRef("torch", row.storage) for row in DTYPES.values() if row.storage}


def _number(value: int) -> bytes:
    """A non-negative integer, as `save` writes it."""
    if value < 1 << 8:
        return pickle.BININT1 + value.to_bytes(1, "little")
    if value < 1 << 16:
        return pickle.BININT2 + value.to_bytes(2, "little")
    if value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little")
    return pickle.LONG1 + bytes([len(encoded := pickle.encode_long(value))]) + encoded


def _value_key(obj: Any) -> Any:
    """A key that two objects share where one may be written for the other; None where none may."""
    kind = type(obj)
    if kind is TensorRef:
        return None
    if kind is bytes or kind is GlobalRef:
        return kind, obj
    if kind is tuple:
        keys = [_element_key(part) for part in obj]
        return None if None in keys else (tuple, *keys)
    return None


def _element_key(obj: Any) -> Any:
    kind = type(obj)
    if obj is None or kind is bool or kind is int:
        return kind, obj
    if kind is float or kind is complex:
        return kind, repr(obj)
    return (kind, obj) if kind is str else _value_key(obj)


def dump(obj: Any) -> bytes:
    """The pickle of plain data and references; an object's identity matters, an equal text's does not."""

    def made() -> bytes:
        file = io.BytesIO()
        TorchPickler(file).dump(obj)
        return file.getvalue()

    return deeply(made)
