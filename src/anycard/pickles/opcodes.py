"""What each pickle opcode does to the machine. Source: CPython's pickletools."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from anycard.errors import FormatError
from anycard.pickles.arrays import text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.pickles.machine import Machine

MARK = object()
STOP, BUILD = b".b"
# What opcodes push, and what the others do.
PUSHES: dict[int, Callable[[Machine], Any]] = {}
STEPS: dict[int, Callable[[Machine], None]] = {}
# Python prints integers of up to 4,300 digits, which are 1,785 bytes; nothing longer may reach a message.
_MOST_INT = 1_700
_MOST_DIGITS = 4_300
_SET = 8  # parts that an empty set counts as: it takes more memory than other containers, for one byte of a pickle
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


def _op(code: bytes) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def register(step: Callable[[Machine], None]) -> Callable[[Machine], None]:
        STEPS[code[0]] = step
        return step

    return register


def _push(code: bytes, make: Callable[[Machine], Any]) -> None:
    PUSHES[code[0]] = make


def _digits(m: Machine) -> str:
    text = m.line()
    if len(text) > _MOST_DIGITS:
        raise FormatError(f"a number of {len(text):,} digits")
    return text


def _float_line(m: Machine) -> float:
    return float(_digits(m))


def _int_line(m: Machine) -> Any:
    text = _digits(m)
    return text == "01" if text in ("00", "01") else int(text.rstrip("L"))


def _signed(m: Machine, nbytes: int) -> int:
    if nbytes > _MOST_INT:
        raise FormatError(f"an integer of {nbytes:,} bytes")
    return int.from_bytes(m.take(nbytes), "little", signed=True)


def _string_line(m: Machine) -> str:
    text = unquoted(m.raw_line())
    if text is None:
        raise FormatError("a STRING without quotes")
    return text


def unquoted(line: bytes) -> str | None:
    """The text of a STRING's line; None where no quotes are around it."""
    text = line.strip()
    if len(text) < 2 or text[0] != text[-1] or text[:1] not in (b"'", b'"'):
        return None
    return text_of(_ESCAPE.sub(_unescaped, text[1:-1]))


def _unescaped(found: re.Match[bytes]) -> bytes:
    """As Python 2 wrote its byte strings."""
    held: bytes = found[1]
    if held[:1] == b"x" and len(held) == 3:
        return bytes([int(held[1:], 16)])
    if held[:1].isdigit() and held[:1] < b"8":
        return bytes([int(held, 8) & 0xFF])
    return _ESCAPED.get(held, held if held in (b"\\", b"'", b'"') else found[0])


def _bytearray(m: Machine) -> bytearray:
    made = bytearray(m.take(m.number(8)))
    if m.budget.embedded is not None:
        m.budget.embedded.note(made, len(made), m.pos - len(made))
    return made


def _empty_set(m: Machine) -> set[Any]:
    m.budget.spend(_SET)
    return set()


def _text(m: Machine) -> Any:
    """A text, and the put into the memo that nearly always follows; or whole rows of a state dict."""
    if m.shortcut is not None and m.shortcut.rows():
        return m.stack.pop()
    text = str(m.take(m.number(4)), "utf-8", "surrogatepass")
    put = m.pos
    if m.data[put : put + 1] == b"r" and put + 5 <= m.size:
        index = int.from_bytes(m.data[put + 1 : put + 5], "little")
        if index not in m.pinned:
            m.memo[index] = text
            m.pos = put + 5
    return text


def _empty_dict(m: Machine) -> dict[Any, Any]:
    """A dict; in one step where it is what a state dict's metadata has for each module, `{"version": 1}`."""
    found = _VERSION.match(m.data, m.pos)
    if found is None:
        return {}
    put, far_put, get, far_get, number = found.groups()
    index = int.from_bytes(put or far_put, "little")
    key = m.memo_at(int.from_bytes(get or far_get, "little"))
    if type(key) is not str or index in m.pinned:
        return {}
    made = m.memo[index] = {key: number[0]}
    m.pos = found.end()
    if m.shortcut is not None:
        m.shortcut.version_was_read()
    return made


_VERSION = re.compile(rb"[qr](?:(?<=q)(.)|(?<=r)(....))[hj](?:(?<=h)(.)|(?<=j)(....))K(.)s", re.DOTALL)


_push(b"(", lambda m: MARK)
_push(b"N", lambda m: None)
_push(b"\x88", lambda m: True)
_push(b"\x89", lambda m: False)
_push(b"I", _int_line)
_push(b"L", _int_line)
_push(b"J", lambda m: _signed(m, 4))
_push(b"K", lambda m: m.byte())
_push(b"M", lambda m: m.number(2))
_push(b"\x8a", lambda m: _signed(m, m.byte()))
_push(b"\x8b", lambda m: _signed(m, m.number(4)))
_push(b"F", _float_line)
_push(b"G", lambda m: struct.unpack(">d", m.take(8))[0])
_push(b"S", _string_line)
_push(b"T", lambda m: text_of(m.take(m.number(4))))
_push(b"U", lambda m: text_of(m.take(m.byte())))
_push(b"B", lambda m: m.long_bytes(m.number(4)))
_push(b"C", lambda m: m.take(m.byte()))
_push(b"\x8e", lambda m: m.long_bytes(m.number(8)))
_push(b"\x96", _bytearray)
_push(b"V", lambda m: m.raw_line().decode("raw_unicode_escape"))
_push(b"X", _text)
_push(b"\x8c", lambda m: m.take(m.byte()).decode("utf-8", "surrogatepass"))
_push(b"\x8d", lambda m: m.take(m.number(8)).decode("utf-8", "surrogatepass"))
_push(b"]", lambda m: [])
_push(b"}", _empty_dict)
_push(b")", lambda m: ())
_push(b"\x8f", _empty_set)
_push(b"l", lambda m: m.popmark())
_push(b"t", lambda m: tuple(m.popmark()))
_push(b"\x91", lambda m: m.frozen(m.popmark()))
_push(b"\x85", lambda m: (m.pop(),))
_push(b"\x86", lambda m: (m.pop(), m.pop())[::-1])
_push(b"\x87", lambda m: (m.pop(), m.pop(), m.pop())[::-1])
_push(b"2", lambda m: m.top())
_push(b"h", lambda m: m.recall(m.byte()))
_push(b"j", lambda m: m.recall(m.number(4)))
_push(b"g", lambda m: m.recall(int(_digits(m))))
_push(b"P", lambda m: m.persistent_load(m.line()))
_push(b"Q", lambda m: m.persistent_load(m.pop()))
_push(b"c", lambda m: m.find_class(m.line(), m.line()))


@_op(b"\x80")
def _proto(m: Machine) -> None:
    m.protocol = m.byte()
    if m.protocol > 5:
        raise FormatError("a pickle protocol above 5")


@_op(b"\x95")
def _frame(m: Machine) -> None:
    size = m.number(8)
    if m.pos + size > m.size:
        m.overrun(size)
    else:
        m.framed(m.pos + size)


@_op(b"0")
def _drop(m: Machine) -> None:
    m.stack.pop()


@_op(b"1")
def _drop_to_mark(m: Machine) -> None:
    m.popmark()


@_op(b"q")
def _binput(m: Machine) -> None:
    m.remember(m.byte())


@_op(b"r")
def _long_binput(m: Machine) -> None:
    m.remember(m.number(4))


@_op(b"p")
def _put(m: Machine) -> None:
    m.remember(int(_digits(m)))


@_op(b"\x94")
def _memoize(m: Machine) -> None:
    m.remember(m.memo.count())


@_op(b"\x93")
def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise FormatError("a global whose name is no text")
    m.stack.append(m.find_class(module, name))


@_op(b"d")
def _dict(m: Machine) -> None:
    made: dict[Any, Any] = {}
    m.set_items(made, m.popmark())
    m.stack.append(made)


@_op(b"a")
def _append(m: Machine) -> None:
    item = m.pop()
    m.append([item])


@_op(b"e")
def _appends(m: Machine) -> None:
    m.append(m.popmark())


@_op(b"\x90")
def _additems(m: Machine) -> None:
    m.append(m.popmark())


@_op(b"s")
def _setitem(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.top(), [key, value])


@_op(b"u")
def _setitems(m: Machine) -> None:
    pairs = m.popmark()
    m.set_items(m.top(), pairs)


@_op(b"R")
def _reduce(m: Machine) -> None:
    args, func = m.pop(), m.pop()
    m.stack.append(m.call(func, args))


@_op(b"\x81")
def _newobj(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.stack.append(m.new(cls, args, {}))


@_op(b"\x92")
def _newobj_ex(m: Machine) -> None:
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    m.stack.append(m.new(cls, args, kwargs))


@_op(b"o")
def _obj(m: Machine) -> None:
    items = m.popmark()
    m.stack.append(m.call(items[0], tuple(items[1:])))


@_op(b"i")
def _inst(m: Machine) -> None:
    cls = m.find_class(m.line(), m.line())
    m.stack.append(m.call(cls, tuple(m.popmark())))


@_op(b"b")
def _build(m: Machine) -> None:
    state = m.pop()
    m.build(state)
