"""Names and tensors one after the other, as torch and anycard write a state dict, read as columns.

What `shortcut` does for one tensor is done for all that follow in the same form. Their places in the memo are
consecutive, and are filled when something asks for them, which hardly anything does.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, islice, takewhile
from typing import Any, NamedTuple

from anycard.errors import FormatError
from anycard.pickles.views import StoredStorage
from anycard.tensors import Form, Storage, TensorInfo, form_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.pickles.machine import Machine
    from anycard.pickles.shortcut import Shortcut

_PARTS = {b"number": rb"(?:K.|M..|J....)", b"get": rb"(?:h.|j....)"}
_NEW = rb"%(number)s\x85|%(number)s{2}\x86|%(number)s{3}\x87|\(%(number)s{4,8}t"
_SIZES = rb"((?:\)|%(get)s|" + _NEW + rb"))(?:r(....))?"
# Each opcode's length follows from its first byte, but for texts', whose claims are compared with what was found.
_NAME = rb"X(.)\0\0\0([ -~]{1,255})r(....)"
_HEAD = rb"(%(get)s\(\(%(get)s{2}X.)\0\0\0([0-9]{1,20})r(....)(%(get)s%(number)sN?)tr(....)"
_TAIL = rb"([\x88\x89]%(get)s)\)Rr(....)t(?:r(....))?Rr(....)"
_ROW = re.compile((_NAME + _HEAD + rb"Q(%(number)s)" + _SIZES + _SIZES + _TAIL) % _PARTS, re.DOTALL)
_VERSION_ROW = re.compile((_NAME + rb"}r(....)(%(get)s)K(.)s") % _PARTS, re.DOTALL)
_HEAD_PARTS = re.compile(rb"(%(get)s)\(\((%(get)s{2})X(.)" % _PARTS, re.DOTALL)
_STORAGE_PARTS = re.compile(rb"(%(get)s)(%(number)s)(N?)" % _PARTS, re.DOTALL)


_FEW = 4


class _Kind(NamedTuple):
    """What is said in a row's form: in all of it but its texts and its places in the memo.

    Attributes:
        key_size: Bytes of the storage's key.
        latest: The highest place in the memo that sizes and strides are taken from, or -1.
        cls, rest: The storage's class, and what follows its key in the persistent id.
        needed: Bytes that the storage has to have: those claimed, and up to the last element.
        start: Byte offset of element 0 in what the persistent id names.
    """

    key_size: int
    latest: int
    cls: type[StoredStorage]
    rest: tuple[Any, ...]
    needed: int
    start: int
    form: Form


class _Columns(NamedTuple):
    """Rows that stand one after the other; places are those in the memo, four bytes each, None where there is none."""

    name_size: Sequence[bytes]
    name: Sequence[bytes]
    name_place: Sequence[bytes]
    head: Sequence[bytes]
    key: Sequence[bytes]
    key_place: Sequence[bytes]
    storage: Sequence[bytes]
    storage_place: Sequence[bytes]
    offset: Sequence[bytes]
    shape: Sequence[bytes]
    shape_place: Sequence[bytes | None]
    stride: Sequence[bytes]
    stride_place: Sequence[bytes | None]
    tail: Sequence[bytes]
    hooks_place: Sequence[bytes]
    args_place: Sequence[bytes | None]
    place: Sequence[bytes]

    def begins(self, first: int) -> list[int]:
        """The first place in the memo of each row, and the one behind the last; they are to be consecutive."""
        there = zip(self.shape_place, self.stride_place, self.args_place, strict=True)
        return list(accumulate([8 - row.count(None) for row in there], initial=first))

    def places(self) -> bytes:
        """All places in the memo, in order."""
        columns = (
            self.name_place, self.key_place, self.storage_place, self.shape_place, self.stride_place,
            self.hooks_place, self.args_place, self.place,
        )  # fmt: skip
        places = chain.from_iterable(zip(*columns, strict=True))
        return b"".join([place for place in places if place is not None])

    def spelt_out(self) -> dict[int, bytes]:
        """Place in the memo -> the sizes or strides that are put there."""
        places = chain(zip(self.shape_place, self.shape, strict=True), zip(self.stride_place, self.stride, strict=True))
        return {int.from_bytes(place, "little"): raw for place, raw in places if place is not None}


class Rows:
    """The rows that one machine comes to; `vain`: how often they were of no use, since they last were."""

    def __init__(self, machine: Machine, shortcut: Shortcut) -> None:
        self._machine = machine
        self._shortcut = shortcut
        self._most = _FEW
        self._known: dict[tuple[bytes, ...], _Kind] = {}
        self.vain = 0

    def take(self) -> int:
        """Push the names and tensors that stand here, from the X that was just met; gives how many of each."""
        m = self._machine
        rows, found = self._match(_ROW)
        if not rows:
            return 0
        columns = _Columns(*zip(*rows, strict=True))
        first = int.from_bytes(columns.name_place[0], "little")
        begins = columns.begins(first)
        if begins[-1] >= 1 << 32 or not m.memo.is_new(range(first, begins[-1])):
            return 0
        good = _agreeing(columns.name_size, columns.name, columns.places(), begins)
        if good < len(rows):  # what stands behind is not to be looked at: it may claim the same places
            if not good:
                return 0
            columns = _Columns(*zip(*rows[:good], strict=True))
        kinds = self._kinds(columns, first)
        infos = self._tensors(columns, kinds, begins)
        taken = len(infos)
        if taken:
            names = _texts(columns.name[:taken])
            kept = columns if taken == len(rows) else _Columns(*zip(*rows[:taken], strict=True))
            held = _Memory(m, names, kinds[:taken], infos, begins, kept)
            m.memo.promise(range(first, begins[taken]), held.made)
            m.stack.extend(chain.from_iterable(zip(names, infos, strict=True)))
            m.budget.spend(8 * taken)
            m.pos = found[taken - 1].end()
        self._took(taken)
        return taken

    def take_versions(self) -> int:
        """The same of names and `{"version": 1}`, as a state dict's metadata has them for its modules."""
        m = self._machine
        rows, found = self._match(_VERSION_ROW)
        if not rows:
            return 0
        name_size, name, name_place, place, key, number = zip(*rows, strict=True)
        first = int.from_bytes(name_place[0], "little")
        begins = range(first, first + 2 * len(rows) + 1, 2)
        if begins[-1] >= 1 << 32 or not m.memo.is_new(range(first, begins[-1])):
            return 0
        known = {raw: m.memo_at(_place(raw)) for raw in set(key)}
        if not all(type(value) is str for value in known.values()):
            return 0
        places = b"".join(chain.from_iterable(zip(name_place, place, strict=True)))
        taken = _agreeing(name_size, name, places, begins)
        made = [{known[k]: n[0]} for k, n in zip(key, number, strict=True)]
        pairs: list[Any] = [*chain.from_iterable(zip(map(bytes.decode, name[:taken]), made, strict=False))]
        if taken:
            m.memo.promise(range(first, begins[taken]), lambda index: {index: pairs[index - first]})
            m.stack.extend(pairs)
            m.pos = found[taken - 1].end()
        self._took(taken)
        return taken

    def _took(self, taken: int) -> None:
        if taken:
            self.vain = 0
        self._most = max(_FEW, 2 * taken)

    def _match(self, row: re.Pattern[bytes]) -> tuple[list[Sequence[Any]], list[re.Match[bytes]]]:
        """The groups of each row, and the row; not many more than were of use the last time."""
        most, self._most = self._most, _FEW
        step = row.scanner(self._machine.data, self._machine.pos - 1).match  # type: ignore[attr-defined]  # as re.Scanner
        found = list(islice(iter(step, None), most))
        self.vain += bool(found)
        return [one.groups() for one in found], found

    def _tensors(self, columns: _Columns, kinds: Sequence[_Kind | None], begins: Sequence[int]) -> list[TensorInfo]:
        """The tensors, up to the first that is for the interpreter to read."""
        known = [kind for kind in takewhile(bool, kinds) if kind is not None]
        known = known[: _sound(known, columns, begins)]
        if not known:
            return []
        storages, starts = self._storages(known, _texts(columns.key[: len(known)]))
        forms = [kind.form for kind in known[: len(storages)]]
        return list(map(TensorInfo, forms, storages, starts))

    def _storages(self, kinds: Sequence[_Kind], keys: Sequence[str]) -> tuple[Sequence[Storage], Sequence[int]]:
        """Storages that have what is claimed of them, and where in them tensors start; up to the first that lacks."""
        find, load = self._machine.storages, self._machine.persistent_load
        starts = [kind.start for kind in kinds]
        if find is not None:
            where = kinds[0].rest[0]
            alike = list(takewhile(lambda kind: kind.rest[0] == where, kinds))
            there = find(keys[: len(alike)], where)
            lacking = [kind.needed > storage.nbytes for kind, storage in zip(alike, there, strict=False)]
            return (there[: lacking.index(True)] if any(lacking) else there), starts
        found: list[Storage] = []
        for index, (kind, key) in enumerate(zip(kinds, keys, strict=True)):
            try:
                stored = load(("storage", kind.cls, key, *kind.rest))
            except FormatError:
                break  # the interpreter comes to it, and says where
            if stored.storage is None or stored.start + kind.needed > stored.storage.nbytes:
                break
            found.append(stored.storage)
            starts[index] += stored.start
        return found, starts

    def _kinds(self, columns: _Columns, first: int) -> list[_Kind | None]:
        """Each row's kind; None where that is for the interpreter to read. There are far fewer kinds than rows."""
        forms = list(
            zip(columns.head, columns.storage, columns.offset, columns.shape, columns.stride, columns.tail, strict=True)
        )
        spelt_out: dict[int, bytes] = {}
        distinct = set(forms)
        if any(_place(raw) >= first for form in distinct for raw in form[3:5]):
            spelt_out = columns.spelt_out()
        known = {form: self._known.get(form) or self._kind(form, spelt_out) for form in distinct}
        return list(map(known.__getitem__, forms))

    def _kind(self, form: tuple[bytes, ...], spelt_out: Mapping[int, bytes]) -> _Kind | None:
        head, storage, offset, shape, stride, tail = form
        m, shortcut = self._machine, self._shortcut
        told, held = _HEAD_PARTS.fullmatch(head), _STORAGE_PARTS.fullmatch(storage)
        assert told is not None and held is not None
        maker, kind, key_size = told.groups()
        location, numel, none = held.groups()
        known = shortcut.recognised((kind, location, tail[1:]))
        sizes, steps = (shortcut.sizes(spelt_out.get(_place(raw), raw)) for raw in (shape, stride))
        if known is None or not m.makes_tensors(_place(maker)) or sizes is None or steps is None:
            return None
        try:
            shortcut.span(sizes, steps)
        except FormatError:
            return None
        cls, where, itemsize = known
        first, elements = shortcut.number(offset), shortcut.number(numel)
        if first < 0 or elements < 0:
            return None
        start, made = first * itemsize, form_of(str(cls.dtype), sizes, steps, requires_grad=tail[:1] == b"\x88")
        found = _Kind(
            key_size=key_size[0], latest=max(_place(shape), _place(stride)), cls=cls,
            rest=(where, elements, *((None,) if none else ())),
            needed=max(elements * itemsize, start + made.span if made.span else 0), start=start, form=made,
        )  # fmt: skip
        if found.latest < 0:  # nothing of it stands in a place of the memo that may be written again
            m.pinned.add(_place(maker))
            self._known[form] = found
        return found


def _sound(kinds: Sequence[_Kind], columns: _Columns, begins: Sequence[int]) -> int:
    """How many rows have keys as long as they claim, and take their sizes from what stands before them."""
    claimed, lengths = [kind.key_size for kind in kinds], list(map(len, columns.key[: len(kinds)]))
    good = len(kinds) if claimed == lengths else _first_difference(claimed, lengths)
    if max((kind.latest for kind in set(kinds)), default=-1) < begins[0]:
        return good
    for row, (kind, begin, shape_place) in enumerate(zip(kinds[:good], begins, columns.shape_place, strict=False)):
        # Strides may be the sizes that are put right before them.
        if kind.latest >= begin and (shape_place is None or kind.latest != begin + 3):
            return row
    return good


def _texts(raws: Sequence[bytes]) -> list[str]:
    """Of printable ASCII each, one at least."""
    return b"\n".join(raws).decode().split("\n")


class _Memory(NamedTuple):
    """What the memo would hold of rows that were read."""

    machine: Machine
    names: Sequence[str]
    kinds: Sequence[_Kind | None]
    infos: Sequence[TensorInfo]
    begins: Sequence[int]
    columns: _Columns

    def made(self, index: int) -> dict[int, Any]:
        """The places of the row that has the place `index`."""
        row = bisect_right(self.begins, index) - 1
        kind = self.kinds[row]
        assert kind is not None
        pid = ("storage", kind.cls, self.columns.key[row].decode(), *kind.rest)
        stored, info = self.machine.persistent_load(pid), self.infos[row]
        hooks: OrderedDict[Any, Any] = OrderedDict()
        first = (info.start - stored.start) // max(1, info.itemsize)
        args = (stored, first, info.shape, info.stride, info.requires_grad, hooks)
        columns = self.columns
        values = (
            (self.names[row], columns.name_place), (pid[2], columns.key_place), (pid, columns.storage_place),
            (info.shape, columns.shape_place), (info.stride, columns.stride_place),
            (hooks, columns.hooks_place), (args, columns.args_place), (info, columns.place),
        )  # fmt: skip
        return dict(enumerate((value for value, places in values if places[row] is not None), self.begins[row]))


def _agreeing(name_size: Sequence[bytes], name: Sequence[bytes], places: bytes, begins: Sequence[int]) -> int:
    """How many rows have names as long as they claim, and consecutive places in the memo."""
    claimed, found = b"".join(name_size), bytes(map(len, name))
    good = len(begins) - 1
    if claimed != found:
        good = _first_difference(claimed, found)
    wanted = struct.pack(f"<{begins[-1] - begins[0]}I", *range(begins[0], begins[-1]))
    if places != wanted:
        good = min(good, bisect_right(begins, begins[0] + _first_difference(places, wanted) // 4) - 1)
    return good


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def _place(raw: bytes) -> int:
    """The place in the memo that a get asks for; -1 for anything else."""
    if raw[:1] == b"h":
        return raw[1]
    return int.from_bytes(raw[1:], "little") if raw[:1] == b"j" else -1
