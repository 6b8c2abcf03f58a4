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
    sizes = rb"(\)|%(number)s\x85|%(number)s{2}\x86|%(number)s{3}\x87|\(%(number)s{4,8}t)(?:(?<=\))|%(put)s)"
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
        self._known: dict[tuple[bytes, bytes, bytes], tuple[type[StoredStorage], str, int] | None] = {}
        self._numbers: dict[bytes, int] = {}
        self._shapes: dict[tuple[bytes, bytes], _Shape] = {}
        self.passed: list[int] = []

    def tensor(self) -> TensorInfo | None:
        """The tensor whose arguments stand here; None, and nothing done, where that is for the interpreter to read."""
        m = self._machine
        found = _TENSOR.match(m.data, m.pos)
        if found is None:
            return None
        kind, size, key, place, numel, none, offset, shape, stride, grad, hooks, put = found.groups()
        known = self._known.get((kind, place, hooks)) or self._recognised((kind, place, hooks))
        if known is None or size[0] != len(key):
            return None
        cls, location, itemsize = known
        pid = ("storage", cls, key.decode(), location, self._number(numel))
        stored = m.persistent_load((*pid, None) if none else pid)
        sizes, steps, span = self._shapes.get((shape, stride)) or self._shape((shape, stride))
        start = stored.start + self._number(offset) * itemsize
        storage = stored.storage
        if storage is None or start < stored.start or (span and start + span * itemsize > storage.nbytes):
            return None
        made = TensorInfo(str(cls.dtype), sizes, storage, stride=steps, start=start, requires_grad=grad == b"\x88")
        m.budget.spend(8)
        m.memo[_index(put)] = made
        self.passed.append(m.pos)
        m.pos = found.end()
        return made

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
        shape, put_shape, stride, put_stride, grad, hooks, put_hooks, put_args, *_ = rest
        cls, location, _ = self._known[kind, place, hooks] or (StoredStorage, "", 1)
        sizes, steps, _ = self._shapes[shape, stride]
        name = key.decode()
        pid = ("storage", cls, name, location, self._number(numel), *((None,) if none else ()))
        after: OrderedDict[Any, Any] = OrderedDict()
        stored = self._machine.persistent_load(pid)
        args = (stored, self._number(offset), sizes, steps, grad == b"\x88", after)
        puts = (put_key, put_pid, put_shape, put_stride, put_hooks, put_args)
        return list(zip(puts, (name, pid, sizes, steps, after, args), strict=True))

    def _number(self, raw: bytes) -> int:
        value = self._numbers.get(raw)
        if value is None:
            value = self._numbers[raw] = int.from_bytes(raw[1:], "little", signed=raw[:1] == b"J")
        return value

    def _shape(self, raw: tuple[bytes, bytes]) -> _Shape:
        """Sizes, strides, and the elements that they span."""
        budget = self._machine.budget
        shape = ints(budget, [self._number(n) for n in _numbers(raw[0])], "shape")
        stride = ints(budget, [self._number(n) for n in _numbers(raw[1])], "stride")
        sized(shape, stride)
        found = self._shapes[raw] = (shape, stride, span_numel(shape, stride))
        return found

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


def _numbers(raw: bytes) -> list[bytes]:
    """The numbers of a tuple, without what makes them one."""
    return _TOKEN.findall(raw, raw[:1] == b"(", len(raw) - 1)
