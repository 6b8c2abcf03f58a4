"""The pickle interpreter: protocols 0 to 5, bounded, runs nothing. Source: CPython's pickletools."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from anycard.errors import FormatError
from anycard.limits import Limits
from anycard.pickles.known import CALLABLE, ArrayStub, DTypeStub, Globals
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_MARK = object()


def read_pickle(
    data: memoryview | bytes,
    *,
    persistent_load: Callable[[Any], Any],
    limits: Limits,
    base: int = 0,
) -> tuple[Any, int]:
    """Interpret one pickle.

    Args:
        data: The bytes; may go on after the pickle's end.
        persistent_load: Gives the object for a persistent id.
        base: Byte offset of `data` in its file, for errors.

    Returns:
        The object, and the position after STOP.

    Raises:
        FormatError: Truncated, malformed, or beyond the limits; with the byte offset.
    """
    machine = _Machine(bytes(data), persistent_load, limits)
    try:
        return machine.run()
    except FormatError as error:
        error.offset = base + machine.at if error.offset is None else error.offset
        raise
    except _WRONG as error:
        raise FormatError(
            f"the pickle is damaged ({error or type(error).__name__})", offset=base + machine.at
        ) from None


_WRONG = (
    IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip


class _Machine:
    def __init__(self, data: bytes, persistent_load: Callable[[Any], Any], limits: Limits) -> None:
        self.data = data
        self.pos = 0
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.persistent_load = persistent_load
        self.find_class = Globals(limits).find_class

    def run(self) -> tuple[Any, int]:
        data, table, size = self.data, _TABLE, len(self.data)
        while True:
            self.at = pos = self.pos
            if pos >= size:
                raise FormatError(f"the pickle is cut short: no STOP in {size:,} bytes")
            code = data[pos]
            self.pos = pos + 1
            if code == 0x2E:
                return _settled(self.pop()), self.pos
            step = table.get(code)
            if step is None:
                raise FormatError(f"unknown or refused pickle opcode 0x{code:02x}")
            step(self)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise FormatError("the pickle's stack holds a mark where a value is needed")
        return value

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise FormatError("the pickle's stack holds a mark where a value is needed")
        return value

    def take(self, nbytes: int) -> bytes:
        start, end = self.pos, self.pos + nbytes
        if nbytes < 0 or end > len(self.data):
            raise FormatError(f"the pickle is cut short: {nbytes:,} bytes are needed, {len(self.data) - start:,} left")
        self.pos = end
        return self.data[start:end]

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> str:
        return self.raw_line().decode("utf-8")

    def raw_line(self) -> bytes:
        end = self.data.find(b"\n", self.pos)
        if end < 0:
            raise FormatError("the pickle is cut short within a line")
        text = self.data[self.pos : end]
        self.pos = end + 1
        return text

    def popmark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise FormatError("the pickle's stack has no mark")


def _settled(value: Any) -> Any:
    """A finished array is its tensor."""
    if isinstance(value, ArrayStub) and value.result is not None:
        return value.result
    return value


def _call(func: Any, args: Any) -> Any:
    if not isinstance(args, tuple):
        raise FormatError("a call's arguments are no tuple")
    args = tuple(_settled(a) for a in args)
    if func in (set, frozenset) and args and isinstance(args[0], (list, tuple)):
        _keys(list(args[0]))
    if id(func) in CALLABLE or isinstance(func, Inert) or (isinstance(func, type) and issubclass(func, Inert)):
        return func(*args)
    raise FormatError(f"the pickle calls a {type(func).__name__}, which nothing writes")


def _new(cls: Any, args: Any, kwargs: Any = None) -> Any:
    if isinstance(cls, type) and issubclass(cls, Inert):
        return cls.__new__(cls, *args, **(kwargs or {}))
    return _call(cls, args)


def _build(m: _Machine) -> None:
    state = m.pop()
    target = m.top()
    if isinstance(target, ArrayStub):
        target.__setstate__(state)
        if target.result is not None:
            _replace(m, target, target.result)
    elif isinstance(target, (Inert, DTypeStub)):
        target.__setstate__(state)
    elif isinstance(target, OrderedDict) and isinstance(state, dict):
        target.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})
    elif not isinstance(target, (dict, list, set, TensorInfo)):
        raise FormatError(f"BUILD on a {type(target).__name__}")


def _replace(m: _Machine, old: Any, new: Any) -> None:
    """The array is known now: its tensor stands in its place, in the memo too."""
    m.stack[-1] = new
    for key in reversed(m.memo):
        if m.memo[key] is old:
            m.memo[key] = new
            break


def _append(target: Any, items: list[Any]) -> None:
    items = [_settled(i) for i in items]
    if isinstance(target, (list, Inert)):
        target.extend(items)
    elif isinstance(target, set):
        target.update(_keys(items))
    else:
        raise FormatError(f"APPEND to a {type(target).__name__}")


def _keys(values: list[Any]) -> list[Any]:
    """The values, refused where a tuple nests so deeply that hashing it would overrun C's stack."""
    level = [value for value in values if isinstance(value, (tuple, frozenset))]
    for _ in range(100):
        if not level:
            return values
        level = [inner for value in level for inner in value if isinstance(inner, (tuple, frozenset))]
    raise FormatError("a key nests deeper than 100 levels")


def _set(target: Any, pairs: list[Any]) -> None:
    if len(pairs) % 2 or not isinstance(target, (dict, Inert)):
        raise FormatError(f"SETITEMS on a {type(target).__name__}")
    _keys(pairs[::2])
    for index in range(0, len(pairs), 2):
        target[pairs[index]] = _settled(pairs[index + 1])


_TABLE: dict[int, Callable[[_Machine], None]] = {}


def _op(code: bytes) -> Callable[[Callable[[_Machine], None]], Callable[[_Machine], None]]:
    def register(step: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
        _TABLE[code[0]] = step
        return step

    return register


def _push(code: bytes, make: Callable[[_Machine], Any]) -> None:
    _TABLE[code[0]] = lambda m: m.stack.append(make(m))


def _float_line(m: _Machine) -> float:
    return float(m.line())


def _int_line(m: _Machine) -> Any:
    text = m.line()
    return {"00": False, "01": True}.get(text) if text in ("00", "01") else int(text.rstrip("L"))


def _string_line(m: _Machine) -> str:
    text = m.line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise FormatError("a STRING without quotes")
    return text[1:-1].encode("latin1").decode("unicode_escape")


def _signed(m: _Machine, nbytes: int) -> int:
    return int.from_bytes(m.take(nbytes), "little", signed=True)


_push(b"(", lambda m: _MARK)
_push(b"N", lambda m: None)
_push(b"\x88", lambda m: True)
_push(b"\x89", lambda m: False)
_push(b"I", _int_line)
_push(b"L", _int_line)
_push(b"J", lambda m: _signed(m, 4))
_push(b"K", lambda m: m.number(1))
_push(b"M", lambda m: m.number(2))
_push(b"\x8a", lambda m: _signed(m, m.number(1)))
_push(b"\x8b", lambda m: _signed(m, m.number(4)))
_push(b"F", _float_line)
_push(b"G", lambda m: struct.unpack(">d", m.take(8))[0])
_push(b"S", _string_line)
_push(b"T", lambda m: m.take(m.number(4)).decode("latin1"))
_push(b"U", lambda m: m.take(m.number(1)).decode("latin1"))
_push(b"B", lambda m: m.take(m.number(4)))
_push(b"C", lambda m: m.take(m.number(1)))
_push(b"\x8e", lambda m: m.take(m.number(8)))
_push(b"\x96", lambda m: bytearray(m.take(m.number(8))))
_push(b"V", lambda m: m.raw_line().decode("raw_unicode_escape"))
_push(b"X", lambda m: m.take(m.number(4)).decode("utf-8", "surrogatepass"))
_push(b"\x8c", lambda m: m.take(m.number(1)).decode("utf-8", "surrogatepass"))
_push(b"\x8d", lambda m: m.take(m.number(8)).decode("utf-8", "surrogatepass"))
_push(b"]", lambda m: [])
_push(b"}", lambda m: {})
_push(b")", lambda m: ())
_push(b"\x8f", lambda m: set())
_push(b"l", lambda m: [_settled(v) for v in m.popmark()])
_push(b"t", lambda m: tuple(_settled(v) for v in m.popmark()))
_push(b"\x91", lambda m: frozenset(_keys(m.popmark())))
_push(b"\x85", lambda m: (_settled(m.pop()),))
_push(b"\x86", lambda m: tuple(_settled(v) for v in (m.pop(), m.pop()))[::-1])
_push(b"\x87", lambda m: tuple(_settled(v) for v in (m.pop(), m.pop(), m.pop()))[::-1])
_push(b"2", lambda m: m.top())
_push(b"h", lambda m: m.memo[m.number(1)])
_push(b"j", lambda m: m.memo[m.number(4)])
_push(b"g", lambda m: m.memo[int(m.line())])
_push(b"P", lambda m: m.persistent_load(m.line()))
_push(b"Q", lambda m: m.persistent_load(m.pop()))
_push(b"c", lambda m: m.find_class(m.line(), m.line()))


@_op(b"\x80")
def _proto(m: _Machine) -> None:
    if m.number(1) > 5:
        raise FormatError("a pickle protocol above 5")


@_op(b"\x95")
def _frame(m: _Machine) -> None:
    size = m.number(8)
    if m.pos + size > len(m.data):
        raise FormatError(f"the pickle is cut short: a frame of {size:,} bytes, {len(m.data) - m.pos:,} left")


@_op(b"0")
def _drop(m: _Machine) -> None:
    m.stack.pop()


@_op(b"1")
def _drop_to_mark(m: _Machine) -> None:
    m.popmark()


@_op(b"q")
def _binput(m: _Machine) -> None:
    m.memo[m.number(1)] = m.top()


@_op(b"r")
def _long_binput(m: _Machine) -> None:
    m.memo[m.number(4)] = m.top()


@_op(b"p")
def _put(m: _Machine) -> None:
    m.memo[int(m.line())] = m.top()


@_op(b"\x94")
def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.top()


@_op(b"\x93")
def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise FormatError("a global whose name is no text")
    m.stack.append(m.find_class(module, name))


@_op(b"d")
def _dict(m: _Machine) -> None:
    pairs = m.popmark()
    made: dict[Any, Any] = {}
    _set(made, pairs)
    m.stack.append(made)


@_op(b"a")
def _append_one(m: _Machine) -> None:
    item = m.pop()
    _append(m.top(), [item])


@_op(b"e")
def _appends(m: _Machine) -> None:
    items = m.popmark()
    _append(m.top(), items)


@_op(b"\x90")
def _additems(m: _Machine) -> None:
    items = m.popmark()
    _append(m.top(), items)


@_op(b"s")
def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    _set(m.top(), [key, value])


@_op(b"u")
def _setitems(m: _Machine) -> None:
    pairs = m.popmark()
    _set(m.top(), pairs)


@_op(b"R")
def _reduce(m: _Machine) -> None:
    args, func = m.pop(), m.pop()
    m.stack.append(_call(func, args))


@_op(b"\x81")
def _newobj(m: _Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.stack.append(_new(cls, args))


@_op(b"\x92")
def _newobj_ex(m: _Machine) -> None:
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    m.stack.append(_new(cls, args, kwargs))


@_op(b"o")
def _obj(m: _Machine) -> None:
    items = m.popmark()
    m.stack.append(_call(items[0], tuple(items[1:])))


@_op(b"i")
def _inst(m: _Machine) -> None:
    cls = m.find_class(m.line(), m.line())
    m.stack.append(_call(cls, tuple(m.popmark())))


_TABLE[ord("b")] = _build
