"""A tensor's whole description in one step: what takes the interpreter thirty, for the form that torch writes.

Torch's protocol 2 spells each tensor after the first of its dtype in the same opcodes. One regular expression
knows them; every opcode's length follows from its first byte, so that there is one way to read them, which is
the interpreter's. Whatever differs is left to the interpreter.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from anycard.pickles.rows import Rows
from anycard.pickles.stubs import Inert
from anycard.pickles.views import INTEGERS, StoredStorage, ints, is_storage_class, sized
from anycard.tensors import DTYPES, TensorInfo, form_of, span_numel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.pickles.machine import Machine


_PARTS = {b"number": rb"(?:K.|M..|J....)", b"get": rb"(?:h.|j....)", b"put": rb"(q.|r....)"}
_NEW = rb"(%(number)s\x85|%(number)s{2}\x86|%(number)s{3}\x87|\(%(number)s{4,8}t)%(put)s"
_SIZES = rb"(?:(\)|%(get)s)|" + _NEW + rb")"
_STORAGE = rb"\((%(get)s%(get)s)X(.)\0\0\0([0-9]{1,20})%(put)s(%(get)s)(%(number)s)(N?)t%(put)sQ"
_REST = rb"(%(number)s)" + _SIZES + _SIZES + rb"([\x88\x89])(%(get)s)\)R%(put)st%(put)s?R%(put)s"
# The arguments of `_rebuild_tensor_v2`, and the call.
_TENSOR = re.compile((rb"\(" + _STORAGE + _REST) % _PARTS, re.DOTALL)
_TOKEN = re.compile(rb"[Kh].|M..|[Jj]....", re.DOTALL)
_VAIN = 8  # so often, without a use between, rows are read ahead
_Sizes = tuple[int, ...]


class Shortcut:
    """The shortcut for one machine; `taken`: tensors and versions that it has read, `in_rows`: of these, in rows."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[tuple[bytes, bytes, bytes], tuple[type[StoredStorage], str, int]] = {}
        self._numbers: dict[bytes, int] = {}
        self._shapes: dict[bytes, _Sizes] = {}
        self._spans: dict[tuple[_Sizes, _Sizes], int] = {}
        self._rows = Rows(machine, self)
        self._more: Callable[[], int] | None = None
        self.taken = 0
        self.in_rows = 0

    def tensor(self) -> TensorInfo | None:
        """The tensor whose arguments stand here; None, and nothing done, where that is for the interpreter to read."""
        m = self._machine
        found = _TENSOR.match(m.data, m.pos)
        if found is None:
            return None
        kind, size, key, put_key, place, numel, none, put_pid, offset, *sizes = found.groups()
        *sizes, grad, hooks, put_hooks, put_args, put = sizes
        known = self._known.get((kind, place, hooks)) or self.recognised((kind, place, hooks))
        if known is None or size[0] != len(key):
            return None
        shaped = self._shaped(*sizes)
        if shaped is None:
            return None
        (cls, location, itemsize), (shape, stride, span) = known, shaped
        name, first = key.decode(), self.number(offset)
        pid = ("storage", cls, name, location, self.number(numel), *((None,) if none else ()))
        stored = m.persistent_load(pid)
        start, storage = stored.start + first * itemsize, stored.storage
        if storage is None or first < 0 or (span and start + span * itemsize > storage.nbytes):
            return None
        wants_grad = grad == b"\x88"
        made = TensorInfo(form_of(str(cls.dtype), shape, stride, requires_grad=wants_grad), storage, start)
        after: OrderedDict[Any, Any] = OrderedDict()
        args = (stored, first, shape, stride, wants_grad, after)
        puts = (put_key, put_pid, sizes[2], sizes[5], put_hooks, put_args, put)
        if not self._put(puts, (name, pid, shape, stride, after, args, made), sizes):
            return None
        m.budget.spend(8)
        m.pos = found.end()
        self.taken += 1
        self._more = self._rows.take if self._rows.vain < _VAIN else None
        return made

    def version_was_read(self) -> None:
        """What a state dict's metadata has for a module was just read in one step."""
        self._more = self._rows.take_versions

    def rows(self) -> bool:
        """Push the names and values that stand here, if they are like the one before; whether there were any."""
        if self._more is None:
            return False
        taken = self._more()
        self.taken += taken
        self.in_rows += taken
        self._more = self._more if taken else None
        return taken > 0

    def _put(self, puts: Sequence[bytes | None], values: Sequence[Any], sizes: Sequence[bytes | None]) -> bool:
        """Into the memo, what the interpreter would have put there on its way.

        False, and nothing done, where a place is written twice, or is asked for within the same tensor: picklers do
        not write so (but for strides that are the sizes just put), and order matters then.
        """
        placed = {_index(put): value for put, value in zip(puts, values, strict=True) if put is not None}
        held = {_index(get) for get in (sizes[0], sizes[3]) if get is not None and get != b")"}
        if sizes[2] is not None:
            held.discard(_index(sizes[2]))
        m = self._machine
        if len(placed) < 7 - puts.count(None) or not (m.pinned.isdisjoint(placed) and held.isdisjoint(placed)):
            return False
        m.memo.update(placed)
        return True

    def _shaped(
        self, held: bytes | None, new: bytes | None, put: bytes | None,
        held_steps: bytes | None, new_steps: bytes | None, put_steps: bytes | None,
    ) -> tuple[_Sizes, _Sizes, int] | None:  # fmt: skip
        """Sizes and strides, spelt out or by their places in the memo, and the elements that they span."""
        shape = self.sizes(held or new or b"")
        same = held_steps is not None and put is not None and _index(held_steps) == _index(put)
        stride = shape if same else self.sizes(held_steps or new_steps or b"")
        return None if shape is None or stride is None else (shape, stride, self.span(shape, stride))

    def span(self, shape: _Sizes, stride: _Sizes) -> int:
        """The elements from the first to the last; FormatError for sizes and strides that no tensor has."""
        span = self._spans.get((shape, stride))
        if span is None:
            budget = self._machine.budget
            sized(ints(budget, shape, "shape"), ints(budget, stride, "stride"))
            span = self._spans[shape, stride] = span_numel(shape, stride)
        return span

    def sizes(self, raw: bytes) -> _Sizes | None:
        """Numbers; None where the memo has no tuple in that place, for lists may change."""
        if raw[:1] in (b"h", b"j"):
            value = self._machine.memo_at(_index(raw))
            # A long one costs its length each time that it is asked for.
            fits = type(value) is tuple and len(value) <= self._machine.budget.limits.rank
            return value if fits and all(type(size) is int for size in value) else None
        found = self._shapes.get(raw)
        if found is None:
            tokens = _TOKEN.findall(raw, raw[:1] == b"(", len(raw) - 1)
            found = self._shapes[raw] = tuple(self.number(token) for token in tokens)
        return found

    def number(self, raw: bytes) -> int:
        """What an opcode of a number pushes."""
        value = self._numbers.get(raw)
        if value is None:
            value = self._numbers[raw] = int.from_bytes(raw[1:], "little", signed=raw[:1] == b"J")
        return value

    def recognised(self, raw: tuple[bytes, bytes, bytes]) -> tuple[type[StoredStorage], str, int] | None:
        """What the memo's entries are that a tensor refers to, where they are what torch has there."""
        m = self._machine
        indices = [_index(get) for part in raw for get in _TOKEN.findall(part)]
        tag, cls, location, hooks = (m.memo_at(index) for index in indices)
        if not (isinstance(hooks, type) and issubclass(hooks, Inert) and isinstance(location, str)):
            return None
        if tag != "storage" or not is_storage_class(cls) or cls.dtype is None or cls.dtype in INTEGERS:
            return None
        if (hooks.module, hooks.name) != ("collections", "OrderedDict"):
            return None
        m.pinned.update(indices)
        found = self._known[raw] = (cls, location, DTYPES[cls.dtype].itemsize)
        return found


def _index(raw: bytes) -> int:
    """The memo's place in a get or put, of one byte or four."""
    return raw[1] if len(raw) == 2 else int.from_bytes(raw[1:], "little")
