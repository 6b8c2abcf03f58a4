"""Entries of DCP that a stream extension has packed: inflated when they are read, the last one kept.

Source: torch/distributed/checkpoint/_extension.py (`StreamTransformExtension`, `ZStandard`). An extension of one's
own has a name of its own: what it did is told by how the bytes begin.
"""

from __future__ import annotations

import threading
from typing import Any

from zlib_ng import zlib_ng

from anycard.containers.streams import inflated, kind_of, lacking
from anycard.disk.source import MemorySource, Source
from anycard.disk.temporary import TemporarySource
from anycard.errors import FormatError
from anycard.formats.assembled import read_row_major
from anycard.formats.registry import read_file_index
from anycard.limits import Limits
from anycard.pickles.brief import brief, key_text
from anycard.pickles.stubs import Inert
from anycard.pickles.views import short
from anycard.tensors import Storage, TensorInfo

_OVERHEAD = 1 << 20  # of a torch zip beside its tensor
_MOST_STEPS = 4
_PIECE = 1 << 20


class Unpacker(Source):
    """The entry that was inflated last, in a temporary file."""

    def __init__(self, name: str, limits: Limits) -> None:
        super().__init__(name, 0)
        self._limits = limits
        self._lock = threading.Lock()
        self._entry: Source | None = None
        self._held: Source | None = None
        self._tree: Any = None

    def copy(self, entry: Source, want: TensorInfo, start: int, view: memoryview) -> None:
        """Write a part of the row-major bytes of the tensor in an entry."""
        with self._lock:
            if self._entry is not entry:
                self._open(entry, want)
            found = self._tree
            same = isinstance(found, TensorInfo) and (found.dtype, found.shape) == (want.dtype, want.shape)
            if not same or found.conj or found.neg or found.storage.big_endian or found.storage.missing:
                raise FormatError(f"an entry holds {brief(found)}, not {want!r}", path=entry.name)
            read_row_major(found, start, view)

    def _open(self, entry: Source, want: TensorInfo) -> None:
        self.close()
        most = want.nbytes + _OVERHEAD
        source = entry
        for _ in range(_MOST_STEPS):
            if not kind_of(source.read(0, min(source.size, 8))):
                break
            made = TemporarySource(entry.name, inflated(source, most, most), entry.size)
            self.close()
            source = self._held = made
        self._tree = read_file_index(source, self._limits).tree
        if isinstance(self._tree, TensorInfo):
            _check(self._tree.storage)
        self._entry = entry

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
        self._entry = self._held = self._tree = None


def _check(storage: Storage) -> None:
    """The checksum of what was inflated, which is about to be read; a deflated record is checked as it is."""
    if storage.source is None or storage.offset is None:
        return
    crc = 0
    for start in range(0, storage.nbytes, _PIECE):
        crc = zlib_ng.crc32(storage.source.read(storage.offset + start, min(_PIECE, storage.nbytes - start)), crc)
    if storage.crc is not None and crc != storage.crc:
        raise FormatError("a packed entry is damaged: the CRC-32 of what is in it does not match")


def unpacked_object(entry: Source, limits: Limits) -> tuple[Any, int]:
    """The object in an entry that is no tensor, and how many bytes it was made from."""
    source = entry
    for _ in range(_MOST_STEPS):
        if not kind_of(source.read(0, min(source.size, 8))):
            break
        source = MemorySource(entry.name, b"".join(inflated(source, limits.index_nbytes)))
    return read_file_index(source, limits).tree, source.size


def why_not(entry: Source, how: object) -> str:
    """Why a packed entry cannot be read; "" where it can."""
    steps = (
        ", ".join(short(key_text(step)) for step in how[:_MOST_STEPS])
        if isinstance(how, (list, tuple))
        else "something"
    )
    kind = kind_of(entry.read(0, min(entry.size, 8)))
    if not kind:
        return f"its entry is packed by {steps}, which is not read"
    needed = lacking(kind)
    return f"its entry is packed by {steps}: {needed}" if needed else ""


def unread(why: str) -> Inert:
    """In the place of an object that cannot be read."""
    kind = type("Unread", (Inert,), {"module": "torch.distributed.checkpoint", "name": f"({why})"})
    made: Inert = kind()
    return made


class PackedBytes:
    """The row-major bytes of a packed tensor, to slice."""

    def __init__(self, unpacker: Unpacker, entry: Source, want: TensorInfo) -> None:
        self._unpacker, self._entry, self._want = unpacker, entry, want

    def __getitem__(self, cut: slice, /) -> bytearray:
        start, stop, _ = cut.indices(self._want.nbytes)
        made = bytearray(max(stop - start, 0))
        self._unpacker.copy(self._entry, self._want, start, memoryview(made))
        return made
