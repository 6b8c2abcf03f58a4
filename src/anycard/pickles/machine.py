"""The pickle interpreter: protocols 0 to 5, bounded, runs nothing. Source: CPython's pickletools."""

from __future__ import annotations

import _compat_pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from anycard.errors import FormatError
from anycard.limits import Limits
from anycard.pickles.arrays import FollowedArray
from anycard.pickles.budget import Budget
from anycard.pickles.known import Globals
from anycard.pickles.memo import Memo
from anycard.pickles.opcodes import MARK, PUSHES, STEPS
from anycard.pickles.shortcut import Shortcut
from anycard.pickles.stubs import Inert
from anycard.pickles.views import Built
from anycard.tensors import Storage, TensorInfo

# The storages of many keys of one device tag, up to the first that is not there.
FindStorages = Callable[[Sequence[str], str], list[Storage]]
# What a damaged pickle makes Python raise on its way through the steps.
_WRONG = (
    IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip


def read_pickle(
    data: bytes,
    *,
    persistent_load: Callable[[Any], Any],
    limits: Limits,
    start: int = 0,
    base: int = 0,
    budget: Budget | None = None,
    storages: FindStorages | None = None,
) -> tuple[Any, int]:
    """Interpret one pickle.

    The object is made of plain containers and values, `TensorInfo`, `Inert` objects and `Inert` classes
    (a global that is referred to), and nothing else.

    Args:
        data: The bytes; may go on after the pickle's end.
        persistent_load: Gives the object for a persistent id.
        start: Where in `data` the pickle begins.
        base: Byte offset of `data` in its file, for errors.
        budget: What the read may spend, where several share it.
        storages: Gives the storages of many keys, for what `persistent_load` does one at a time.

    Returns:
        The object, and the position in `data` after STOP. What else lies on the stack then is dropped, as
        C's unpickler drops it.

    Raises:
        FormatError: Truncated, malformed, or beyond the limits; with the byte offset.
    """
    machine = Machine(data, start, persistent_load, budget or Budget(limits, len(data) - start), storages)
    return guarded(machine, base)


def guarded(machine: Machine, base: int) -> tuple[Any, int]:
    """Run a machine; whatever a damaged pickle makes of it is a FormatError with the byte offset."""
    try:
        return machine.run()
    except FormatError as error:
        error.offset = base + machine.at if error.offset is None else error.offset
        raise
    except _WRONG as error:
        reason = str(error)[:200] or type(error).__name__
        raise FormatError(f"the pickle is damaged ({reason})", offset=base + machine.at) from None
    finally:
        machine.forget()


def python_3_name(module: str, name: str) -> tuple[str, str]:
    """What Python 3 takes a global of Python 2 for."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _compat_pickle.NAME_MAPPING[module, name]
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def _cut_short(what: str) -> FormatError:
    error = FormatError(f"the pickle is cut short: {what}")
    error.cut_short = True
    return error


def _forgotten(pid: Any) -> Any:
    raise FormatError("the pickle has been read to its end")


class Machine:
    """Stack, memo and position; what each opcode does to them is in `opcodes`.

    Attributes:
        protocol: What PROTO said.
        shortcut: Reads a tensor's description in one step; None where each step counts.
        pinned: Places in the memo that it relies on.
        at: Where the opcode in hand begins.
        pos: Where the next byte is taken.
    """

    def __init__(
        self,
        data: bytes,
        start: int,
        persistent_load: Callable[[Any], Any],
        budget: Budget,
        storages: FindStorages | None = None,
    ) -> None:
        self.data = data
        self.size = len(data)
        self.pos = start
        self.at = start
        self.stack: list[Any] = []
        self.memo = Memo()
        self.persistent_load: Callable[[Any], Any] = persistent_load
        self.storages: FindStorages | None = storages
        self.budget = budget
        self.protocol = 0
        self._globals = Globals(self.budget)
        self.pinned: set[int] = set()
        self.shortcut: Shortcut | None = Shortcut(self)
        self._maker: type[Inert] | None = None

    def run(self) -> tuple[Any, int]:
        """Step until STOP."""
        data, size, push = self.data, len(self.data), self.stack.append
        while True:
            self.at = pos = self.pos
            if pos >= size:
                raise _cut_short(f"no STOP in {size:,} bytes")
            code = data[pos]
            self.pos = pos + 1
            if code == 0x2E:
                return self.pop(), self.pos
            make = PUSHES.get(code)
            if make is not None:
                push(make(self))
                continue
            step = STEPS.get(code)
            if step is None:
                raise FormatError(f"unknown or refused pickle opcode 0x{code:02x}")
            step(self)

    def forget(self) -> None:
        """Let go of all that there may be much of: the machine is part of a cycle, and stays until a collection."""
        self.shortcut, self.storages, self.memo = None, None, Memo()
        self.stack.clear()
        self.persistent_load = _forgotten

    # Bytes.

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        start = self.pos
        self.pos = end = start + nbytes
        if end > self.size:
            raise self._lacks(nbytes, start)
        return self.data[start:end]

    def _lacks(self, nbytes: int, start: int) -> FormatError:
        return _cut_short(f"{nbytes:,} bytes are needed, {self.size - start:,} left")

    def skip(self, nbytes: int) -> None:
        """Pass over the next bytes."""
        if self.pos + nbytes > self.size:
            raise self._lacks(nbytes, self.pos)
        self.pos += nbytes

    def inner(self) -> Any:
        """The object of a whole pickle that stands here, within this one."""
        machine = self.fresh(self.pos)
        value, self.pos = machine.run()
        machine.forget()
        return value

    def fresh(self, start: int) -> Machine:
        """A machine of the same kind for another pickle in the same bytes."""
        return Machine(self.data, start, self.persistent_load, self.budget, self.storages)

    def overrun(self, size: int) -> None:
        """A frame is longer than the pickle, which C's unpickler refuses before it goes into it."""
        raise _cut_short(f"a frame of {size:,} bytes, {self.size - self.pos:,} left")

    def framed(self, end: int) -> None:
        """A frame goes up to there, which is of no use to a reader."""

    def long_bytes(self, nbytes: int) -> bytes:
        """The next bytes as a value of the pickle, whose place may be asked for."""
        data = self.take(nbytes)
        if self.budget.embedded is not None:
            self.budget.embedded.note(data, nbytes, self.pos - nbytes)
        return data

    def byte(self) -> int:
        """The next byte as an unsigned integer."""
        start = self.pos
        if start >= self.size:
            raise self._lacks(1, start)
        self.pos = start + 1
        return self.data[start]

    def number(self, nbytes: int) -> int:
        """The next bytes as an unsigned integer."""
        start = self.pos
        self.pos = end = start + nbytes
        if end > self.size:
            raise self._lacks(nbytes, start)
        return int.from_bytes(self.data[start:end], "little")

    def raw_line(self) -> bytes:
        """The bytes up to the next line feed."""
        end = self.data.find(b"\n", self.pos)
        if end < 0:
            raise _cut_short("a line does not end")
        text = self.data[self.pos : end]
        self.pos = end + 1
        return text

    def line(self) -> str:
        """The next line as text."""
        return self.raw_line().decode("utf-8")

    # The stack.

    def pop(self) -> Any:
        """Take the top value off."""
        value = self.stack.pop()
        if value is MARK:
            raise FormatError("the pickle's stack holds a mark where a value is needed")
        return value

    def top(self) -> Any:
        """The top value."""
        value = self.stack[-1]
        if value is MARK:
            raise FormatError("the pickle's stack holds a mark where a value is needed")
        return value

    def popmark(self) -> list[Any]:
        """Take all values down to the last mark off, and the mark."""
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise FormatError("the pickle's stack has no mark")

    def recall(self, index: int) -> Any:
        """A value of the memo; a finished array or tensor is its tensor."""
        try:
            value = self.memo[index]
        except KeyError:
            raise FormatError("the pickle's memo lacks what is asked of it") from None
        if value is self._maker and self.shortcut is not None:
            return self.shortcut.tensor() or value
        if isinstance(value, Built) and value.result is not None:
            if isinstance(value, FollowedArray):
                raise FormatError("the pickle asks for the description of an array of joblib's again")
            return value.result
        return value

    def memo_at(self, index: int) -> Any:
        """What the memo holds in a place; None where it holds nothing."""
        try:
            return self.memo[index]
        except KeyError:
            return None

    def makes_tensors(self, index: int) -> bool:
        """That place of the memo holds `torch._utils._rebuild_tensor_v2`."""
        return self._maker is not None and self.memo_at(index) is self._maker

    def remember(self, index: int) -> None:
        """Put the top value into the memo."""
        value = self.stack[-1]
        if value is MARK or index in self.pinned:
            raise FormatError("the pickle puts a mark into its memo, or writes one place of it twice")
        self.memo[index] = value

    # Objects.

    def find_class(self, module: str, name: str) -> type[Inert]:
        """A global; below protocol 3 names are Python 2's, and Python 3 takes them for its own."""
        if self.protocol < 3:
            module, name = python_3_name(module, name)
        found = self._globals.find_class(module, name)
        if name == "_rebuild_tensor_v2" and module == "torch._utils":
            self._maker = found
        return found

    def call(self, func: Any, args: Any) -> Any:
        """REDUCE: what is known is made, everything else is a stub."""
        if type(args) is not tuple:
            raise FormatError("a call's arguments are no tuple")
        self.budget.spend(len(args))
        if isinstance(func, Inert) or (isinstance(func, type) and issubclass(func, Inert)):
            return func(*args)
        raise FormatError(f"the pickle calls a {type(func).__name__}, which nothing writes")

    def new(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """NEWOBJ: an object made by `__new__`."""
        if type(args) is not tuple or type(kwargs) is not dict:
            raise FormatError("a new object's arguments are no tuple and no dict")
        self.budget.spend(len(args) + len(kwargs))
        if isinstance(cls, Inert):  # a class that a call made
            made = cls(*args, **kwargs)
            made.called = False
            return made
        if not isinstance(cls, type) or not issubclass(cls, Inert):
            raise FormatError(f"a new object of a {type(cls).__name__}, which is no class")
        return cls.__new__(cls, *args, **kwargs)

    def build(self, state: Any) -> None:
        """BUILD: state for the top object; plain containers and tensors take none."""
        target = self.top()
        if isinstance(target, Inert):
            target.__setstate__(state)
            self.stack[-1] = self._settled(target)
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            self.budget.spend(len(state))
            # A state dict's `_metadata`; nothing that would stand before the dict's own methods.
            own = {k: v for k, v in state.items() if isinstance(k, str) and not hasattr(OrderedDict, k)}
            target.__dict__.update(own)
        elif isinstance(target, TensorInfo):
            if target.parameter and type(state) is tuple and state[:1] == (False,):
                # Below torch 0.4; the parameter was made for this very object.
                target.form = target.form.replace(requires_grad=False)
        elif not isinstance(target, (dict, list, set)):
            raise FormatError(f"BUILD on a {type(target).__name__}")

    def _settled(self, target: Inert) -> Any:
        if isinstance(target, FollowedArray):
            target.follow(self)
        return target.result if isinstance(target, Built) and target.result is not None else target

    def append(self, items: list[Any]) -> None:
        """APPENDS and ADDITEMS to the top object."""
        target = self.top()
        if isinstance(target, (list, Inert)):
            target.extend(items)
        elif isinstance(target, set):
            for item in items:
                self.budget.keep(item, target)
        else:
            raise FormatError(f"APPEND to a {type(target).__name__}")

    def set_items(self, target: Any, pairs: list[Any]) -> None:
        """SETITEMS: key, value, key, value."""
        if len(pairs) % 2 or not isinstance(target, (dict, Inert)):
            raise FormatError(f"SETITEMS on a {type(target).__name__}")
        if not isinstance(target, Inert) and set(map(type, pairs[::2])) <= {str}:
            target.update(zip(pairs[::2], pairs[1::2], strict=True))
            return
        for index in range(0, len(pairs), 2):
            key = pairs[index]
            if isinstance(target, Inert):
                self.budget.key(key, target)
                target[key] = pairs[index + 1]
            else:
                self.budget.keep(key, target, pairs[index + 1])

    def frozen(self, items: list[Any]) -> frozenset[Any]:
        """FROZENSET."""
        made: set[Any] = set()
        for item in items:
            self.budget.keep(item, made)
        return frozenset(made)
