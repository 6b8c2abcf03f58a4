"""The legacy stream (`torch.save` before 1.6): five pickles, then for each key a count and raw bytes.

Source: torch/serialization.py `_legacy_save`, `_legacy_load`. Always little-endian in practice.
"""

from __future__ import annotations

from typing import Any

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.known import StorageClass, StorageRef
from anycard.pickles.machine import read_pickle
from anycard.tensors import DTYPES, Storage

_MAGIC = 0x1950A86A20F9469CFC6C


def read_index(source: Source, limits: Limits) -> Index:
    """The index of a legacy stream.

    Raises:
        FormatError: Damaged or cut short.
    """
    size = min(source.size, 1 << 20)
    while True:
        storages = _Storages(source)
        try:
            tree, keys, end = _pickles(source.read(0, size), storages, limits)
            break
        except FormatError as error:
            if size >= min(source.size, limits.index_nbytes) or "cut short" not in str(error):
                raise
            size = min(source.size, limits.index_nbytes, size * 4)
    storages.place(keys, end)
    return Index("legacy stream", tree, source)


def _pickles(data: bytes, storages: _Storages, limits: Limits) -> tuple[Any, list[Any], int]:
    at = 0
    values = []
    for _ in range(5):
        value, used = read_pickle(data[at:], persistent_load=storages.load, limits=limits, base=at)
        values.append(value)
        at += used
    if values[0] != _MAGIC or values[1] != 1001:
        raise FormatError("the file begins like a legacy torch file, but its magic numbers are others", offset=0)
    if not isinstance(values[4], list):
        raise FormatError("the list of storage keys is no list", offset=at)
    return values[3], values[4], at


class _Storages:
    """Persistent ids of one stream; the bytes are placed once the pickles are read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.made: dict[str, tuple[Storage, int]] = {}

    def load(self, pid: Any) -> Any:
        """`('storage', class, key, location, numel, view)` or `('module', class, file, source)`."""
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageClass):
            raise FormatError(f"a persistent id that torch does not write: {str(pid)[:80]}")
        _, kind, key, location, numel = pid[:5]
        if type(numel) is not int or numel < 0:
            raise FormatError(f"storage {key} has no size")
        size = DTYPES[kind.dtype or "uint8"].itemsize
        known = self.made.get(str(key))
        if known is None:
            known = self.made[str(key)] = (Storage(str(key), numel * size, str(location), self.source), size)
        start = 0
        view = pid[5] if len(pid) > 5 else None
        if view is not None:
            if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or view[1] < 0:
                raise FormatError(f"storage {key} has a view that torch does not write")
            start = view[1] * size
        return StorageRef(known[0], kind.dtype, start)

    def place(self, keys: list[Any], at: int) -> None:
        """Give every storage its range, proved inside the file."""
        for key in keys:
            known = self.made.get(str(key))
            if known is None:
                raise FormatError(f"storage {key} is listed, but nothing uses it", offset=at)
            storage, size = known
            if at + 8 + storage.nbytes > self.source.size:
                raise FormatError(
                    f"the file is cut short: storage {key} needs {storage.nbytes:,} bytes, "
                    f"the file ends at {self.source.size:,}. Copy or download the file again.",
                    offset=at,
                    name=str(key),
                )
            count = int.from_bytes(self.source.read(at, 8), "little")
            if count * size != storage.nbytes:
                raise FormatError(f"storage {key} has {count:,} elements where its pickle says otherwise", offset=at)
            storage.offset = at + 8
            at += 8 + storage.nbytes
        missing = [key for key, (storage, _) in self.made.items() if storage.offset is None and storage.nbytes]
        if missing:
            raise FormatError(f"storage {missing[0]} has no bytes in the file", offset=at)
