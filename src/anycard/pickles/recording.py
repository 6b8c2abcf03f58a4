"""The interpreter that reads, writing down each global and each call on its way. It runs nothing, either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from anycard.errors import FormatError
from anycard.pickles.arrays import FollowedArray
from anycard.pickles.budget import Budget
from anycard.pickles.machine import Machine, guarded
from anycard.pickles.opcodes import BUILD, PUSHES, STEPS, STOP
from anycard.pickles.stubs import Inert
from anycard.pickles.views import MOST_ELEMENTS, is_storage_class
from anycard.tensors import DTYPES, Storage

# Calls whose argument is a pickle or a torch file in itself.
_NESTED = frozenset((("torch.storage", "_load_from_bytes"), ("pickle", "loads"), ("_pickle", "loads")))
_MOST_NESTED = 10_000
# Attributes of an object that an unpickler calls.
_CALLED = frozenset("__setstate__ append extend add __setitem__ __reduce_ex__ __class__".split())


@dataclass
class Record:
    """What one pickle names and calls.

    Attributes:
        globals: Global -> byte offset of its first mention in the pickle's data.
        calls: What is called (REDUCE and kin), or made by `__new__` -> byte offset of the first call.
        run: What is called as it is: a class's `__init__`, a function.
        mentions: How often each global is put on the stack, where anything may happen to it.
        followed: How often one of them was called with bytes that `nested` holds.
        made: How often one of them was the class of a new object.
        handed: Classes of objects that code of others gets hold of, which may call their methods.
        hooked: An object is given what its next opcode may call.
        nested: Bytes that a call would load as a pickle or a torch file, each once.
        end: Where the pickle ends.
        trouble: Why it could not be loaded, though it could be followed.
        arrays: Bytes of joblib's arrays stand in it, which only joblib passes over.
    """

    globals: dict[tuple[str, str], int] = field(default_factory=dict)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    run: set[tuple[str, str]] = field(default_factory=set)
    mentions: Counter[tuple[str, str]] = field(default_factory=Counter)
    followed: Counter[tuple[str, str]] = field(default_factory=Counter)
    made: Counter[tuple[str, str]] = field(default_factory=Counter)
    handed: set[tuple[str, str]] = field(default_factory=set)
    hooked: bool = False
    nested: dict[bytes, None] = field(default_factory=dict)
    end: int = 0
    trouble: str = ""
    arrays: bool = False

    def only_followed(self, module: str, name: str) -> bool:
        """Wherever the global is mentioned, it is called with bytes that `nested` holds."""
        return 0 < self.followed[module, name] == self.mentions[module, name]

    def only_made(self, module: str, name: str) -> bool:
        """It is a class of which objects are made by `__new__` and given state, and nothing calls their methods."""
        place = (module, name)
        loose = self.made[place] != self.mentions[place] or place in self.run or place in self.handed
        return not (loose or self.hooked)


class _Recorder(Machine):
    def __init__(self, data: bytes, start: int, budget: Budget, record: Record, load: Callable[[Any], Any]) -> None:
        super().__init__(data, start, self._identified, budget)
        self._load = load
        self._record = record
        self.shortcut = None  # each call is to be seen
        self._in_frame = False
        self._frame_end = 0

    def find_class(self, module: str, name: str) -> type[Inert]:
        found = super().find_class(module, name)
        self._record.globals.setdefault((found.module, found.name), self.at)
        self._mention(found)
        return found

    def recall(self, index: int) -> Any:
        value = super().recall(index)
        self._mention(value)
        return value

    def top(self) -> Any:
        value = super().top()
        self._mention(value)
        return value

    def _mention(self, value: Any) -> None:
        if isinstance(value, type):
            self._record.mentions[_place(value)] += 1

    def _hand(self, value: Any) -> None:
        self._record.handed.update(_objects_in(value, self.budget))

    def fresh(self, start: int) -> Machine:
        return _Recorder(self.data, start, self.budget, self._record, self._load)

    def _identified(self, pid: Any) -> Any:
        self._hand(pid)
        return self._load(pid)

    def overrun(self, size: int) -> None:
        self._record.trouble = f"the pickle is cut short: a frame of {size:,} bytes, {self.size - self.pos:,} left"

    def framed(self, end: int) -> None:
        """Follow a frame: of one that ends within an opcode, C forgets the rest when it reads on in the file."""
        if self._in_frame:
            self._record.trouble = "a frame begins within a frame"
            return
        self._in_frame, self._frame_end = True, end
        code = 0
        while self.pos < end and self.data[self.pos] != STOP:
            self.at = self.pos
            code = self.byte()
            make, step = PUSHES.get(code), STEPS.get(code)
            if make is not None:
                self.stack.append(make(self))
            elif step is not None:
                step(self)
            else:
                raise FormatError(f"unknown or refused pickle opcode 0x{code:02x}")
        self._in_frame = False
        if self.pos > end and code != BUILD:  # joblib's arrays stand behind their frames
            self._record.trouble = "a frame ends within an opcode"

    def build(self, state: Any) -> None:
        kind = type(self.top())
        self._hand(state if isinstance(state, Inert) else [v for v in _halves(state) if isinstance(v, Inert)])
        self._record.hooked |= any(map(_hooks, _halves(state)))
        at = self.pos
        super().build(state)
        if issubclass(kind, FollowedArray):
            self._record.arrays = True
            if self._in_frame and at < self._frame_end:  # joblib reads its bytes from behind the frame
                self._record.trouble = "an array of joblib's stands within a frame"

    def append(self, items: list[Any]) -> None:
        self._filled()
        super().append(items)

    def set_items(self, target: Any, pairs: list[Any]) -> None:
        self._hand(target if isinstance(target, Inert) else ())
        super().set_items(target, pairs)

    def _filled(self) -> None:
        target = self.stack[-1] if self.stack else None
        self._hand(target if isinstance(target, Inert) else ())

    def call(self, func: Any, args: Any) -> Any:
        place = self._note(func, args)
        self._record.run.add(place)
        if isinstance(func, type) and self._nests(place, args):
            self._record.followed[place] += 1
        return super().call(func, args)

    def new(self, cls: Any, args: Any, kwargs: Any) -> Any:
        place = self._note(cls, (args, kwargs))
        self._nests(place, args)
        if isinstance(cls, type):
            self._record.made[place] += 1
        return super().new(cls, args, kwargs)

    def _note(self, func: Any, args: Any) -> tuple[str, str]:
        place = _place(func if isinstance(func, type) else type(func))
        self._record.calls.setdefault(place, self.at)
        self._hand((args, func))
        return place

    def _nests(self, place: tuple[str, str], args: Any) -> bool:
        """It is a call with bytes that are a pickle, and they are kept."""
        if place not in _NESTED or type(args) is not tuple or not args or type(args[0]) not in (bytes, bytearray):
            return False
        data, held = bytes(args[0]), self._record.nested
        if data not in held and len(held) >= _MOST_NESTED:
            return False
        held[data] = None
        return True


def _place(kind: type) -> tuple[str, str]:
    return getattr(kind, "module", ""), getattr(kind, "name", "")


def _objects_in(value: Any, budget: Budget, depth: int = 3) -> Iterator[tuple[str, str]]:
    """Classes of the objects that stand in it, as far down as a constructor may iterate over its arguments."""
    if isinstance(value, Inert):
        yield _place(type(value))
    elif depth and isinstance(value, (list, tuple, dict)):
        budget.spend(len(value))  # calls may share what they are given
        for held in value.values() if isinstance(value, dict) else value:
            yield from _objects_in(held, budget, depth - 1)


def _halves(state: Any) -> tuple[Any, ...]:
    """What an unpickler takes a state for: attributes, or (attributes, slots)."""
    return state if type(state) is tuple and len(state) == 2 else (state,)


def _hooks(state: Any) -> bool:
    """Attributes among which an unpickler finds what it calls; a key that is an object may equal any text."""
    return isinstance(state, dict) and any(type(key) is not str or key in _CALLED for key in state)


def _any_storage(pid: Any) -> Any:
    """A storage that is as large as the pickle says: a scan looks at the pickle, not at the bytes beside it."""
    if type(pid) is tuple and len(pid) >= 5 and is_storage_class(pid[1]) and type(pid[4]) is int:
        numel = min(max(pid[4], 0), MOST_ELEMENTS)
        size = DTYPES[pid[1].dtype].itemsize if pid[1].dtype else 1
        return pid[1].of(Storage("scan", numel * size, missing="only scanned"), numel)
    return pid


def record_pickle(
    data: bytes, start: int, budget: Budget, record: Record, load: Callable[[Any], Any] = _any_storage, base: int = 0
) -> tuple[Any, int]:
    """Interpret one pickle to its STOP, into `record`, which holds what was met up to there on an error as well.

    Returns:
        What `read_pickle` does.

    Raises:
        FormatError: It cannot be followed to its end; with the byte offset.
    """
    value, record.end = guarded(_Recorder(data, start, budget, record, load), base)
    if record.trouble:
        raise FormatError(record.trouble)
    return value, record.end
