"""The legacy stream (`torch.save` before 1.6): five pickles, then for each key a count and raw bytes.

Source: torch/serialization.py `_legacy_save`, `_legacy_load`. Always little-endian in practice.
"""

from __future__ import annotations

from typing import Any

from anycard.disk.source import MemorySource, Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.budget import Budget
from anycard.pickles.machine import read_pickle
from anycard.pickles.views import MOST_ELEMENTS, is_storage_class, short
from anycard.tensors import DTYPES, Storage

_MAGIC = 0x1950A86A20F9469CFC6C


def read_index(source: Source, limits: Limits) -> Index:
    """The index of a legacy stream.

    Raises:
        FormatError: Damaged or cut short.
    """
    size = min(source.size, limits.chunk_nbytes)
    while True:
        storages = _Storages(source)
        try:
            tree, keys, end = _pickles(source.read(0, size), storages, limits)
            break
        except FormatError as error:
            if size >= min(source.size, limits.index_nbytes) or not error.cut_short:
                raise
            size = min(source.size, limits.index_nbytes, size * 4)
    storages.place(keys, end)
    return Index("legacy stream", tree, source)


def read_nested(data: bytes, place: tuple[Source, int] | None, budget: Budget) -> Any:
    """The object of a stream within a pickle; its storages lie in the file at `place`, or else in memory."""
    storages = _Storages(MemorySource("a torch file within the pickle", data))
    tree, keys, end = _pickles(data, storages, budget.limits, budget)
    storages.place(keys, end)
    storages.move(data, place)
    return tree


def _pickles(
    data: bytes, storages: _Storages, limits: Limits, budget: Budget | None = None
) -> tuple[Any, list[Any], int]:
    at = 0
    values = []
    for _ in range(5):
        value, at = read_pickle(data, persistent_load=storages.load, limits=limits, start=at, budget=budget)
        values.append(value)
        if type(values[0]) is not int or values[0] != _MAGIC or (len(values) == 2 and values[1] != 1001):
            raise FormatError("the file begins like a legacy torch file, but its magic numbers are others", offset=0)
    if not isinstance(values[4], list):
        raise FormatError("the list of storage keys is no list", offset=at)
    return values[3], values[4], at


class _Storages:
    """Persistent ids of one stream; the bytes are placed once the pickles are read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._made: dict[str, tuple[Storage, int]] = {}

    def load(self, pid: Any) -> Any:
        """`('storage', class, key, location, numel, view)` or `('module', class, file, source)`."""
        if type(pid) is not tuple or len(pid) < 2:
            raise FormatError("a persistent id that torch does not write")
        if pid[0] == "module":
            return pid[1]
        if len(pid) < 5 or pid[0] != "storage" or not is_storage_class(pid[1]) or not isinstance(pid[3], str):
            raise FormatError("a persistent id that torch does not write")
        _, kind, key, location, numel = pid[:5]
        name = _name(key)
        if type(numel) is not int or not 0 <= numel < MOST_ELEMENTS:
            raise FormatError(f"storage {short(name)} has no size that torch can hold")
        size = DTYPES[kind.dtype or "uint8"].itemsize
        known = self._made.get(name)
        if known is None:
            known = self._made[name] = (Storage(name, numel * size, location, self._source), size)
        start, count = _viewed(pid[5] if len(pid) > 5 else None, numel, name)
        if (start + count) * size > known[0].nbytes:
            raise FormatError(f"a view reaches outside of storage {short(name)}")
        return kind.of(known[0], count, start * size)

    def place(self, keys: list[Any], at: int) -> None:
        """Give every storage its range, proved inside the file."""
        for key in keys:
            name = _name(key, at)
            known = self._made.get(name)
            if known is None:
                raise FormatError(f"storage {short(name)} is listed, but nothing uses it", offset=at)
            self._place(*known, at)
            at += 8 + known[0].nbytes
        missing = [key for key, (storage, _) in self._made.items() if storage.offset is None and storage.nbytes]
        if missing:
            raise FormatError(f"storage {short(missing[0])} has no bytes in the file", offset=at)

    def move(self, data: bytes, place: tuple[Source, int] | None) -> None:
        """The stream is no file of its own: its bytes lie at a place of another, or in memory."""
        for storage, _ in self._made.values():
            at = storage.offset or 0
            if place is None:
                storage.source, storage.offset, storage.data = None, None, data[at : at + storage.nbytes]
            else:
                storage.source, storage.offset = place[0], place[1] + at
                storage.settle()

    def _place(self, storage: Storage, size: int, at: int) -> None:
        name = short(storage.key)
        if storage.offset is not None:
            raise FormatError(f"storage {name} is listed twice", offset=at)
        if at + 8 + storage.nbytes > self._source.size:
            raise FormatError(
                f"the file is cut short: storage {name} needs {storage.nbytes:,} bytes, "
                f"the file ends at {self._source.size:,}. Copy or download the file again.",
                offset=at,
                name=name,
            )
        count = int.from_bytes(self._source.read(at, 8), "little")
        if count * size != storage.nbytes:
            raise FormatError(f"storage {name} has {count:,} elements where its pickle says otherwise", offset=at)
        storage.offset = at + 8
        storage.settle()


def _name(key: Any, at: int | None = None) -> str:
    """A storage's key: text, or a number as the oldest torch wrote."""
    if type(key) not in (str, int):
        raise FormatError("a storage's key is neither text nor a number", offset=at)
    return str(key)


def _viewed(view: Any, numel: int, name: str) -> tuple[int, int]:
    """First element and number of elements of a view `(key, offset, numel)` of a storage."""
    if view is None:
        return 0, numel
    fits = type(view) is tuple and len(view) == 3
    if not fits or not all(type(v) is int and 0 <= v < MOST_ELEMENTS for v in view[1:]):
        raise FormatError(f"storage {short(name)} has a view that torch does not write")
    return view[1], view[2]
