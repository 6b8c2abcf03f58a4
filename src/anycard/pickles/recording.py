"""The interpreter that reads, writing down each global and each call on its way. It runs nothing, either."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass
class Record:
    """What one pickle names and calls.

    Attributes:
        globals: Global -> byte offset of its first mention in the pickle's data.
        calls: What is called (REDUCE and kin), or made by `__new__` -> byte offset of the first call.
        run: What is called as it is: a class's `__init__`, a function.
        nested: Bytes that a call would load as a pickle or a torch file.
        end: Where the pickle ends.
        trouble: Why it could not be loaded, though it could be followed.
        arrays: Bytes of joblib's arrays stand in it, which only joblib passes over.
    """

    globals: dict[tuple[str, str], int] = field(default_factory=dict)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    run: set[tuple[str, str]] = field(default_factory=set)
    nested: list[bytes] = field(default_factory=list)
    end: int = 0
    trouble: str = ""
    arrays: bool = False


class _Recorder(Machine):
    def __init__(self, data: bytes, start: int, budget: Budget, record: Record, load: Callable[[Any], Any]) -> None:
        super().__init__(data, start, load, budget)
        self._record = record
        self.shortcut = None  # each call is to be seen
        self._in_frame = False

    def find_class(self, module: str, name: str) -> type[Inert]:
        found = super().find_class(module, name)
        self._record.globals.setdefault((found.module, found.name), self.at)
        return found

    def fresh(self, start: int) -> Machine:
        return _Recorder(self.data, start, self.budget, self._record, self.persistent_load)

    def overrun(self, size: int) -> None:
        self._record.trouble = f"the pickle is cut short: a frame of {size:,} bytes, {self.size - self.pos:,} left"

    def framed(self, end: int) -> None:
        """Follow a frame: of one that ends within an opcode, C forgets the rest when it reads on in the file."""
        if self._in_frame:
            self._record.trouble = "a frame begins within a frame"
            return
        self._in_frame = True
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
        super().build(state)
        self._record.arrays |= issubclass(kind, FollowedArray)

    def call(self, func: Any, args: Any) -> Any:
        self._record.run.add(self._note(func, args))
        return super().call(func, args)

    def new(self, cls: Any, args: Any, kwargs: Any) -> Any:
        self._note(cls, args)
        return super().new(cls, args, kwargs)

    def _note(self, func: Any, args: Any) -> tuple[str, str]:
        kind = func if isinstance(func, type) else type(func)
        place = (getattr(kind, "module", ""), getattr(kind, "name", ""))
        self._record.calls.setdefault(place, self.at)
        holds = place in _NESTED and type(args) is tuple and args and isinstance(args[0], (bytes, bytearray))
        if holds and len(self._record.nested) < _MOST_NESTED:
            self._record.nested.append(bytes(args[0]))
        return place


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
