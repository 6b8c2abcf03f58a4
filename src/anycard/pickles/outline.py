"""What a stream of pickles names, by its opcodes and the depth of its stack alone, whatever its values would be.

No unpickler follows what this does not: where the interpreter refuses (a bomb, a value that nothing writes, an odd
spelling of a number), Python's goes on, and so does this. It ends where every unpickler has to. Source: CPython's
pickletools; Modules/_pickle.c.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from anycard.disk.source import Source
from anycard.pickles.arrays import text_of
from anycard.pickles.machine import python_3_name
from anycard.pickles.opcodes import unquoted

# What stands on the stack beside texts, which may become names: an object is a global, or what a call made.
_MARK, _PLAIN, _OBJECT = object(), object(), object()
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip
_NUMBER = re.compile(rb"\s*[+-]?(\d|\.\d|inf|nan)", re.IGNORECASE)  # C reads on up to what is no part of one
_AHEAD = 64 << 10  # bytes that are read at once
_LONG = 64 << 10  # no name is longer
_KEEPS = frozenset("APPEND APPENDS SETITEM SETITEMS ADDITEMS BUILD MEMOIZE READONLY_BUFFER DUP".split())
_ASKS = _KEEPS - {"MEMOIZE", "READONLY_BUFFER", "DUP"}


@dataclass
class Outline:
    """What was met.

    Attributes:
        globals: Global -> byte offset of its first mention.
        calls: One of them, or what came of it, is called or given something.
        end: Where the last pickle ends that has a STOP.
        short: The bytes end before it does.
        torn: A frame ends within an opcode, whose bytes C takes from elsewhere; or within it another begins.
    """

    globals: dict[tuple[str, str], int] = field(default_factory=dict)
    calls: bool = False
    end: int = 0
    short: bool = False
    torn: bool = False


def outline(source: Source, start: int = 0, *, one: bool = False, ids: bool = True) -> Outline:
    """Follow one pickle, or pickles one after the other up to what is none. Little of the source is held at once.

    Args:
        ids: The loader knows what to do with persistent ids, as torch does; `pickle.load` does not.
    """
    found = Outline(end=start)
    try:
        while found.end < source.size:
            found.end = _Walk(source, found, ids).run()
            if one:
                break
    except _OverError:
        pass
    except _ShortError:
        found.short = True
    return found


class _OverError(Exception):
    """No unpickler goes on from here."""


class _ShortError(Exception):
    """The bytes end here."""


class _Op(NamedTuple):
    """An opcode: bytes of its argument, or how they are told; values that it takes, and gives.

    Attributes:
        to_mark: It takes all values above the last mark, and `takes` below.
    """

    name: str
    nbytes: int
    takes: int
    to_mark: bool
    gives: int


def _op(info: pickletools.OpcodeInfo) -> _Op:
    before = [held.name for held in info.stack_before]
    to_mark = "mark" in before
    takes = before.index("mark") if to_mark else len(before)
    return _Op(info.name, 0 if info.arg is None else info.arg.n, takes, to_mark, len(info.stack_after))


_OPS = {ord(info.code): _op(info) for info in pickletools.opcodes}
_AT_ONCE = b"N\x88\x89]}\x8f)"  # None, True, False, empty containers


class _Walk:
    """One pickle.

    Attributes:
        argument: Of the opcode in hand.
        taken: The values that it takes; `above` those above the mark.
    """

    def __init__(self, source: Source, found: Outline, ids: bool) -> None:
        self.argument = b""
        self.taken: list[Any] = []
        self.above: list[Any] = []
        self.found = found
        self.memo: dict[int, Any] = {}
        self._ids = ids
        self._source = source
        self._window = b""  # of the source, from `_base` on; `_pos` is a place in it
        self._base = found.end
        self._pos = self._at = 0
        self._stack: list[Any] = []
        self._protocol = 0
        self._frame_end = 0

    def run(self) -> int:
        """The place after STOP."""
        while True:
            self._at = self._base + self._pos
            if 0 < self._frame_end <= self._at:
                self.found.torn |= self._frame_end < self._at
                self._frame_end = 0
            code = self._bytes(1)[0]
            if code in _AT_ONCE:
                self._stack.append(_PLAIN)
                continue
            op = _OPS.get(code)
            if op is None:
                raise _OverError
            self.argument = self._argument(op.nbytes) if op.nbytes else b""
            self.above = self._above_mark() if op.to_mark else []
            self.taken = self._take(op) if op.takes else []
            if op.name == "STOP":
                return self._base + self._pos
            self._stack.extend([self._made(op)] * op.gives)

    def _made(self, op: _Op) -> Any:
        """What the opcode gives."""
        if op.name in _KEEPS:
            target = self.taken[0]
            self.found.calls |= op.name in _ASKS and target is _OBJECT
            if op.name == "MEMOIZE":
                self.memo[len(self.memo)] = target
            return target
        make = _MAKES.get(op.name)
        return _PLAIN if make is None else make(self)

    def _argument(self, nbytes: int) -> bytes:
        if nbytes > 0:
            return self._bytes(nbytes)
        if nbytes == pickletools.UP_TO_NEWLINE:
            return self.line()
        return self._bytes(int.from_bytes(self._bytes(_WIDTHS[nbytes]), "little"))

    def _bytes(self, nbytes: int) -> bytes:
        """The next bytes; none of so many that they are no name."""
        start = self._pos
        if start + nbytes <= len(self._window):
            self._pos = start + nbytes
            return self._window[start : self._pos]
        if self._base + start + nbytes > self._source.size:
            raise _ShortError
        self._base, self._pos = self._base + start, 0
        if nbytes > _LONG:
            self._base, self._window = self._base + nbytes, b""
            return b""
        self._window = self._source.read(self._base, min(_AHEAD + nbytes, self._source.size - self._base))
        return self._bytes(nbytes)

    def line(self) -> bytes:
        """Up to the next line feed; the beginning and the last byte of a long one."""
        held = b""
        while True:
            end = self._window.find(b"\n", self._pos)
            held = held[:_LONG] + self._window[self._pos : end if end >= 0 else None]
            if end >= 0:
                self._pos = end + 1
                return held
            self._base, self._pos = self._base + len(self._window), 0
            if self._base >= self._source.size:
                raise _ShortError
            self._window = self._source.read(self._base, min(_AHEAD, self._source.size - self._base))

    def _above_mark(self) -> list[Any]:
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                above = stack[index + 1 :]
                del stack[index:]
                return above
        raise _OverError

    def _take(self, op: _Op) -> list[Any]:
        taken = self._stack[-op.takes :]
        if len(taken) < op.takes or (_MARK in taken and op.name != "POP"):
            raise _OverError
        del self._stack[-op.takes :]
        return taken

    def top(self) -> Any:
        """The value that stays on top."""
        if not self._stack or self._stack[-1] is _MARK:
            raise _OverError
        return self._stack[-1]

    def named(self, module: str, name: str) -> object:
        """A global, by the name that Python 3 has for it."""
        place = python_3_name(module, name) if self._protocol < 3 else (module, name)
        self.found.globals.setdefault(place, self._at)
        return _OBJECT

    def called(self, func: Any) -> object:
        """What a call makes."""
        if func is not _OBJECT:
            raise _OverError
        self.found.calls = True
        return _OBJECT

    def proto(self) -> None:
        """PROTO."""
        self._protocol = self.argument[0]
        if self._protocol > 5:
            raise _OverError

    def persistent(self) -> object:
        """PERSID, BINPERSID."""
        if not self._ids:
            raise _OverError
        return _PLAIN

    def frame(self) -> None:
        """FRAME."""
        self.found.torn |= self._frame_end > 0
        self._frame_end = self._base + self._pos + int.from_bytes(self.argument, "little")


def _text(data: bytes, encoding: str, errors: str = "strict") -> str:
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError:
        raise _OverError from None


def _number(walk: _Walk) -> object:
    if not _NUMBER.match(walk.argument):
        raise _OverError
    return _PLAIN


def _quoted(walk: _Walk) -> str:
    text = unquoted(walk.argument)
    if text is None:
        raise _OverError
    return text


def _of_lines(walk: _Walk) -> object:
    return walk.named(_text(walk.argument, "utf-8"), _text(walk.line(), "utf-8"))


def _of_stack(walk: _Walk) -> object:
    if _PLAIN in walk.taken:
        raise _OverError
    return walk.named("(a computed name)", "") if _OBJECT in walk.taken else walk.named(*walk.taken)


def _of_table(walk: _Walk) -> object:
    return walk.named("copyreg", f"extension {int.from_bytes(walk.argument, 'little')}")


def _inst(walk: _Walk) -> object:
    return walk.called(_of_lines(walk))


def _obj(walk: _Walk) -> object:
    return walk.called(walk.above[0] if walk.above else _PLAIN)


def _line_index(walk: _Walk) -> int:
    try:
        return int(walk.argument.partition(b"\0")[0])
    except ValueError:
        raise _OverError from None


def _index(walk: _Walk) -> int:
    return int.from_bytes(walk.argument, "little")


def _put(index: Callable[[_Walk], int]) -> Callable[[_Walk], None]:
    return lambda walk: walk.memo.__setitem__(index(walk), walk.top())


def _get(index: Callable[[_Walk], int]) -> Callable[[_Walk], Any]:
    def recall(walk: _Walk) -> Any:
        if index(walk) not in walk.memo:
            raise _OverError
        return walk.memo[index(walk)]

    return recall


def _call(walk: _Walk) -> object:
    return walk.called(walk.taken[0])


def _old_text(walk: _Walk) -> str:
    return text_of(walk.argument)


def _utf_8(walk: _Walk) -> str:
    return _text(walk.argument, "utf-8", "surrogatepass")


_MAKES: dict[str, Callable[[_Walk], Any]] = {
    "PROTO": _Walk.proto, "FRAME": _Walk.frame, "PERSID": _Walk.persistent, "BINPERSID": _Walk.persistent,
    "MARK": lambda walk: _MARK,
    "INT": _number, "LONG": _number, "FLOAT": _number,
    "STRING": _quoted, "BINSTRING": _old_text, "SHORT_BINSTRING": _old_text,
    "UNICODE": lambda walk: _text(walk.argument, "raw_unicode_escape"),
    "BINUNICODE": _utf_8, "SHORT_BINUNICODE": _utf_8, "BINUNICODE8": _utf_8,
    "PUT": _put(_line_index), "BINPUT": _put(_index), "LONG_BINPUT": _put(_index),
    "GET": _get(_line_index), "BINGET": _get(_index), "LONG_BINGET": _get(_index),
    "GLOBAL": _of_lines, "STACK_GLOBAL": _of_stack, "EXT1": _of_table, "EXT2": _of_table, "EXT4": _of_table,
    "REDUCE": _call, "NEWOBJ": _call, "NEWOBJ_EX": _call, "OBJ": _obj, "INST": _inst,
}  # fmt: skip
