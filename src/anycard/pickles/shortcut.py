"""A tensor's whole description in one step: what takes the interpreter thirty, for the form that torch writes.

Torch's protocol 2 spells each tensor after the first of its dtype in the same opcodes. One regular expression
knows them; every opcode's length follows from its first byte, so that there is one way to read them, which is
the interpreter's. Whatever differs is left to the interpreter.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

from anycard.errors import FormatError
from anycard.pickles.stubs import Inert
from anycard.pickles.views import StoredStorage, ints, is_storage_class, sized
from anycard.tensors import DTYPES, TensorInfo, span_numel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.pickles.machine import Machine


def _pattern(put: bytes) -> re.Pattern[bytes]:
    """The arguments of `_rebuild_tensor_v2` and the call, with what is to stand for its puts into the memo."""
    parts = {b"number": rb"(?:K.|M..|J....)", b"get": rb"(?:h.|j....)", b"put": put}
    new = rb"(%(number)s\x85|%(number)s{2}\x86|%(number)s{3}\x87|\(%(number)s{4,8}t)(q.|r....)"
    sizes = rb"(?:(\)|%(get)s)|" + new + rb")"
    storage = rb"\((%(get)s%(get)s)X(.)\0\0\0([0-9]{1,20})%(put)s(%(get)s)(%(number)s)(N?)t%(put)sQ"
    rest = rb"(%(number)s)" + sizes + sizes + rb"([\x88\x89])(%(get)s)\)R%(put)st(?:%(put)s)?R(q.|r....)"
    return re.compile((rb"\(" + storage + rest) % parts, re.DOTALL)


_TENSOR = _pattern(rb"(?:q.|r....)")
_PUTS = _pattern(rb"(q.|r....)")
_TOKEN = re.compile(rb"[Kh].|M..|[Jj]....", re.DOTALL)
_Shape = tuple[tuple[int, ...], tuple[int, ...], int]


class Shortcut:
    """The shortcut for one machine; what it put into the memo beside the tensors is put there when asked for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[tuple[bytes, bytes, bytes], tuple[type[StoredStorage], str, int]] = {}
        self._numbers: dict[bytes, int] = {}
        self._shapes: dict[tuple[bytes, bytes], _Shape] = {}
        self.passed: list[int] = []

    def tensor(self) -> TensorInfo | None:
        """The tensor whose arguments stand here; None, and nothing done, where that is for the interpreter to read."""
        m = self._machine
        found = _TENSOR.match(m.data, m.pos)
        if found is None:
            return None
        kind, size, key, place, numel, none, offset, *sizes, grad, hooks, put = found.groups()
        known = self._known.get((kind, place, hooks)) or self._recognised((kind, place, hooks))
        if known is None or size[0] != len(key):
            return None
        cls, location, itemsize = known
        pid = ("storage", cls, key.decode(), location, self._number(numel))
        stored = m.persistent_load((*pid, None) if none else pid)
        shaped = self._sizes(*sizes)
        if shaped is None:
            return None
        shape, stride, span = shaped
        start = stored.start + self._number(offset) * itemsize
        storage = stored.storage
        if storage is None or start < stored.start or (span and start + span * itemsize > storage.nbytes):
            return None
        made = TensorInfo(str(cls.dtype), shape, storage, stride=stride, start=start, requires_grad=grad == b"\x88")
        m.budget.spend(8)
        m.memo[_index(put)] = made
        self.passed.append(m.pos)
        m.pos = found.end()
        return made

    def _sizes(
        self, held: bytes | None, new: bytes | None, put: bytes | None,
        held_steps: bytes | None, new_steps: bytes | None, put_steps: bytes | None,
    ) -> _Shape | None:  # fmt: skip
        """Sizes and strides, spelt out or by their places in the memo, and the elements that they span.

        Later tensors refer to them, so they go into the memo at once.
        """
        raw = (held or new or b"", held_steps or new_steps or b"")
        found = self._shapes.get(raw)
        if found is None:
            budget, told = self._machine.budget, (self._tuple(raw[0]), self._tuple(raw[1]))
            if not (isinstance(told[0], tuple) and isinstance(told[1], tuple)):  # a list may change
                return None
            shape, stride = ints(budget, told[0], "shape"), ints(budget, told[1], "stride")
            sized(shape, stride)
            found = self._shapes[raw] = (shape, stride, span_numel(shape, stride))
        if put is not None:
            self._machine.memo[_index(put)] = found[0]
        if put_steps is not None:
            self._machine.memo[_index(put_steps)] = found[1]
        return found

    def _tuple(self, raw: bytes) -> Any:
        if raw[:1] in b"hj":
            self._machine.pinned.add(_index(raw))
            return self._machine.memo.get(_index(raw))
        return tuple(self._number(number) for number in _TOKEN.findall(raw, raw[:1] == b"(", len(raw) - 1))

    def settle(self) -> None:
        """Put what the interpreter would have put into the memo on its way through the tensors passed.

        Raises:
            FormatError: An entry of the memo is written twice, which no pickler does.
        """
        m, passed = self._machine, self.passed
        self.passed = []
        for start in passed:
            found = _PUTS.match(m.data, start)
            assert found is not None
            for put, value in self._values(found):
                if put is not None and m.memo.setdefault(_index(put), value) is not value:
                    raise FormatError("the pickle's memo is written twice in one place")

    def _values(self, found: re.Match[bytes]) -> list[tuple[bytes | None, Any]]:
        kind, _, key, put_key, place, numel, none, put_pid, offset, *rest = found.groups()
        *sizes, grad, hooks, put_hooks, put_args, _ = rest
        cls, location, _ = self._known[kind, place, hooks]
        shape, stride, _ = self._sizes(*sizes) or ((), (), 0)
        name = key.decode()
        pid = ("storage", cls, name, location, self._number(numel), *((None,) if none else ()))
        after: OrderedDict[Any, Any] = OrderedDict()
        stored = self._machine.persistent_load(pid)
        args = (stored, self._number(offset), shape, stride, grad == b"\x88", after)
        return list(zip((put_key, put_pid, put_hooks, put_args), (name, pid, after, args), strict=True))

    def _number(self, raw: bytes) -> int:
        value = self._numbers.get(raw)
        if value is None:
            value = self._numbers[raw] = int.from_bytes(raw[1:], "little", signed=raw[:1] == b"J")
        return value

    def _recognised(self, raw: tuple[bytes, bytes, bytes]) -> tuple[type[StoredStorage], str, int] | None:
        """What the memo's entries are that a tensor refers to, where they are what torch has there."""
        m = self._machine
        indices = [_index(get) for part in raw for get in _TOKEN.findall(part)]
        tag, cls, location, hooks = (m.memo.get(index) for index in indices)
        if not (isinstance(hooks, type) and issubclass(hooks, Inert) and isinstance(location, str)):
            return None
        if tag != "storage" or not is_storage_class(cls) or cls.dtype is None:
            return None
        if (hooks.module, hooks.name) != ("collections", "OrderedDict"):
            return None
        m.pinned.update(indices)
        found = self._known[raw] = (cls, location, DTYPES[cls.dtype].itemsize)
        return found


def _index(raw: bytes) -> int:
    """The memo's place in a get or put, of one byte or four."""
    return raw[1] if len(raw) == 2 else int.from_bytes(raw[1:], "little")
