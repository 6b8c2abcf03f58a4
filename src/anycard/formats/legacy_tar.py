"""The legacy tar (torch before 0.1.10): members `storages`, `tensors` and `pickle`, each named by object addresses.

Source: torch/serialization.py `legacy_load`. Always little-endian.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

from anycard.containers.tar_directory import entries
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.budget import Budget
from anycard.pickles.machine import read_pickle
from anycard.pickles.views import MOST_ELEMENTS, StoredStorage, ints, is_storage_class, view
from anycard.tensors import DTYPES, Storage, TensorInfo

_Read = Callable[..., tuple[Any, int]]
MEMBERS = ("pickle", "storages", "tensors")
_FIRST = 4_096  # bytes that hold the few words before a storage's elements


def is_legacy_tar(source: Source, limits: Limits) -> bool:
    """The tar has the three members, whatever they are; where it is damaged, before the damage."""
    names = set()
    with contextlib.suppress(FormatError):
        for member, _ in entries(source, limits):
            names.add(_plain(member.name))
    return names.issuperset(MEMBERS)


def read_index(source: Source, limits: Limits, read: _Read = read_pickle) -> Index:
    """The index of a legacy tar.

    Args:
        read: Interprets each of its pickles, as `read_pickle` does.

    Raises:
        FormatError: Damaged or cut short.
    """
    members = _members(source, limits)
    known: dict[Any, Any] = {}
    _read_storages(source, members["storages"], known, limits, read)
    _read_tensors(_member(source, members["tensors"], limits), members["tensors"][0], known, limits, read)
    data = _member(source, members["pickle"], limits)
    tree, _ = read(data, persistent_load=_Known(known).load, limits=limits, base=members["pickle"][0])
    return Index("legacy tar", tree, source)


def _plain(name: str) -> str:
    return name.rstrip("/")


def _members(source: Source, limits: Limits) -> dict[str, tuple[int, int]]:
    """Offset and size of the three members; torch would take the last of two, and follow a link to another member."""
    found: dict[str, tuple[int, int]] = {}
    for member, is_file in entries(source, limits):
        name = _plain(member.name)
        if name in found:
            raise FormatError(f"two members are called {name!r}", offset=member.offset)
        if name in MEMBERS:
            if not is_file:
                raise FormatError(f"member {name!r} is a link or a folder, not a file", offset=member.offset)
            found[name] = (member.offset, member.nbytes)
    missing = next((name for name in MEMBERS if name not in found), None)
    if missing is not None:
        raise FormatError(f"the file is a tar without the member {missing!r}: no torch file", offset=0)
    return found


def _member(source: Source, place: tuple[int, int], limits: Limits) -> bytes:
    if place[1] > limits.index_nbytes:
        raise FormatError(f"a pickle of {place[1]:,} bytes", offset=place[0])
    return source.read(*place)


def _refuse(pid: Any) -> Any:
    raise FormatError("a persistent id where torch writes none")


def _small_pickle(source: Source, at: int, end: int, limits: Limits, read: _Read) -> tuple[Any, int]:
    """A pickle among raw bytes, and where it ends."""
    size = min(_FIRST, end - at)
    while True:
        try:
            value, taken = read(source.read(at, size), persistent_load=_refuse, limits=limits, base=at)
            return value, at + taken
        except FormatError as error:
            most = min(end - at, limits.index_nbytes)
            if size >= most or not error.cut_short:
                raise
            size = min(size * 16, most)


def _read_storages(source: Source, place: tuple[int, int], known: dict[Any, Any], limits: Limits, read: _Read) -> None:
    """A count, then for each: (key, location, class), an int64 of elements, the elements; then the views."""
    at, end = place[0], sum(place)
    count, at = _small_pickle(source, at, end, limits, read)
    for _ in range(_count(count, at)):
        held, at = _small_pickle(source, at, end, limits, read)
        key, location, kind = _three(held, at)
        if not is_storage_class(kind) or kind.dtype is None or not isinstance(location, str):
            raise FormatError("a storage that torch does not write", offset=at)
        if at + 8 > end:
            raise FormatError("the file is cut short within the storages", offset=at)
        nbytes = int.from_bytes(source.read(at, 8), "little") * DTYPES[kind.dtype].itemsize
        at += 8
        if at + nbytes > end:
            raise FormatError(f"the file is cut short: storage {key} needs {nbytes:,} bytes", offset=at)
        storage = Storage(str(key), nbytes, location, source, at).settle()
        _keep(known, key, kind.of(storage, nbytes // DTYPES[kind.dtype].itemsize), at)
        at += nbytes
    views, at = _small_pickle(source, at, end, limits, read)
    for held in views if isinstance(views, (list, tuple)) else ():
        _view(held, known, at)


def _view(held: Any, known: dict[Any, Any], at: int) -> None:
    """A storage that is a part of another: (its key, the other's, first element, elements)."""
    if type(held) is not tuple or len(held) != 4:
        raise FormatError("a view of a storage that torch does not write", offset=at)
    key, root_key, first, numel = held
    root = known.get(root_key) if type(root_key) in (int, str) else None
    if not isinstance(root, StoredStorage) or root.storage is None:
        raise FormatError("a view of a storage that is not there", offset=at)
    kind = type(root)
    size = DTYPES[kind.dtype or "uint8"].itemsize
    if not all(type(n) is int and 0 <= n < MOST_ELEMENTS for n in (first, numel)):
        raise FormatError("a view of a storage has no size that torch can hold", offset=at)
    if root.start + (first + numel) * size > root.storage.nbytes:
        raise FormatError("a view reaches outside of its storage", offset=at)
    _keep(known, key, kind.of(root.storage, numel, root.start + first * size), at)


def _read_tensors(data: bytes, base: int, known: dict[Any, Any], limits: Limits, read: _Read) -> None:
    """A count, then for each: (key, storage, class), int32 dimensions and 4 bytes, int64 sizes, strides, offset."""
    budget = Budget(limits, len(data))
    count, at = read(data, persistent_load=_refuse, limits=limits, base=base, budget=budget)
    for _ in range(_count(count, base + at)):
        held, at = read(data, persistent_load=_refuse, limits=limits, start=at, base=base, budget=budget)
        key, storage_key, _ = _three(held, base + at)
        rank = int.from_bytes(data[at : at + 4], "little")
        end = at + 8 + 16 * rank + 8
        if rank > limits.rank or end > len(data):
            raise FormatError("a tensor with too many dimensions, or cut short", offset=base + at)
        numbers = struct.unpack_from(f"<{2 * rank + 1}q", data, at + 8)
        storage = known.get(storage_key)
        if not isinstance(storage, StoredStorage) or storage.storage is None or type(storage).dtype is None:
            raise FormatError("a tensor of a storage that is not there", offset=base + at)
        try:
            _keep(known, key, _tensor(budget, storage, numbers[:rank], numbers[rank:-1], numbers[-1]), base + at)
        except FormatError as error:
            error.offset = base + at if error.offset is None else error.offset
            raise
        at = end


def _tensor(
    budget: Budget, stored: StoredStorage, size: tuple[int, ...], stride: tuple[int, ...], first: int
) -> TensorInfo:
    assert stored.storage is not None
    dtype = type(stored).dtype or "uint8"
    (first,) = ints(budget, (first,), "offset")
    start = stored.start + first * DTYPES[dtype].itemsize
    return view(stored.storage, dtype, start, ints(budget, size, "shape"), ints(budget, stride, "stride"))


def _keep(known: dict[Any, Any], key: Any, value: Any, at: int) -> None:
    if key in known:
        raise FormatError(f"two objects have the address {key}", offset=at)
    known[key] = value


def _count(value: Any, at: int) -> int:
    if type(value) is not int or value < 0:
        raise FormatError("a number of objects that is none", offset=at)
    return value


def _three(held: Any, at: int) -> tuple[Any, Any, Any]:
    """(key, …, …), the key an address."""
    if type(held) is not tuple or len(held) != 3 or type(held[0]) not in (int, str):
        raise FormatError("an entry that torch does not write", offset=at)
    if type(held[1]) not in (int, str):
        raise FormatError("an entry that torch does not write", offset=at)
    return held


class _Known:
    """Persistent ids of the pickle: an address as text or number, or (class, file, source) of a module."""

    def __init__(self, known: dict[Any, Any]) -> None:
        self._known = known

    def load(self, pid: Any) -> Any:
        """The tensor, storage or class of an id."""
        if type(pid) is tuple and pid:
            return pid[0]
        if type(pid) is str and pid.isascii() and pid.isdigit() and len(pid) <= 20:
            pid = int(pid)
        found = self._known.get(pid) if type(pid) is int else None
        if found is None:
            raise FormatError("a persistent id that names nothing in the file")
        return found
