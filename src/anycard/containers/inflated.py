"""The bytes of a record, whether it is stored or deflated; inflated piece by piece, checked at its end."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable, Iterator

from zlib_ng import zlib_ng

from anycard.containers.zip_directory import Record
from anycard.disk.source import Source
from anycard.disk.temporary import TemporarySource
from anycard.errors import FormatError

_PIECE = 1 << 20
_MOST_KEPT = 64 << 20  # what any archive may inflate to


class Kept:
    """The records of an archive that were sliced more than once, inflated: a storage may have many views.

    The last ones in memory; those that are too large for that in files without a name.
    """

    def __init__(self) -> None:
        self._held: dict[str, bytearray] = {}
        self._files: dict[str, TemporarySource] = {}
        self._asked: set[str] = set()
        self._lock = threading.Lock()

    def get(self, record: Record) -> bytearray | None:
        """Its bytes, if they are kept in memory."""
        return self._held.get(record.name)

    def wants(self, record: Record) -> bool:
        """It was asked for before."""
        again = record.name in self._asked
        self._asked.add(record.name)
        return again

    def file(self, record: Record, pieces: Callable[[], Iterator[bytes]]) -> TemporarySource:
        """The file that it is kept in."""
        with self._lock:
            if record.name not in self._files:
                made = TemporarySource(record.name, pieces(), record.stored_nbytes)
                self._files[record.name] = made
                weakref.finalize(self, made.close)
            return self._files[record.name]

    def put(self, record: Record, data: bytearray) -> None:
        """Keep it, instead of those that were kept first."""
        with self._lock:
            self._held[record.name] = data
            while sum(map(len, self._held.values())) > _MOST_KEPT:
                del self._held[next(iter(self._held))]


class Inflated:
    """A deflated record as bytes to slice: inflated for each slice, of which alone memory is taken at first.

    Args:
        kept: Where records of the archive are kept once they are sliced again.
    """

    def __init__(self, source: Source, record: Record, kept: Kept | None = None) -> None:
        self._source = source
        self._record = record
        self._kept = kept

    def __getitem__(self, cut: slice, /) -> bytearray:
        """The bytes of a slice.

        Raises:
            FormatError: Damaged, or shorter or longer than the directory says.
        """
        start, stop, _ = cut.indices(self._record.nbytes)
        if self._kept is None:
            return self._slice(start, stop)
        data = self._kept.get(self._record)
        if data is None and self._kept.wants(self._record):
            if self._record.nbytes > _MOST_KEPT:
                return self._large(start, stop)
            data = self._slice(0, self._record.nbytes)
            self._kept.put(self._record, data)
        return self._slice(start, stop) if data is None else data[start:stop]

    def _large(self, start: int, stop: int) -> bytearray:
        """Of a record that memory is not taken for: a small part is read from a file, a large one inflated anew."""
        if self._kept is None or stop - start > self._record.nbytes // 4:
            return self._slice(start, stop)
        return bytearray(self._kept.file(self._record, self.pieces).read(start, max(stop - start, 0)))

    def _slice(self, start: int, stop: int) -> bytearray:
        held = bytearray()
        at = crc = 0
        for piece in self._pieces():
            held += piece[max(start - at, 0) : max(stop - at, 0)]
            at += len(piece)
            crc = zlib_ng.crc32(piece, crc)
            if stop <= at < self._record.nbytes:
                return held
        if at != self._record.nbytes:
            raise self._damaged("its size does not match")
        if self._record.crc is not None and crc != self._record.crc:
            raise self._damaged("its CRC-32 does not match")
        return held

    def pieces(self) -> Iterator[bytes]:
        """All bytes in order; FormatError at their end where they are not what the directory says."""
        at = crc = 0
        for piece in self._pieces():
            at += len(piece)
            crc = zlib_ng.crc32(piece, crc)
            yield piece
        if at != self._record.nbytes or crc != (crc if self._record.crc is None else self._record.crc):
            raise self._damaged("its size or its CRC-32 does not match")

    def _pieces(self) -> Iterator[bytes]:
        """What the record inflates to, up to one byte more than it should."""
        record, source = self._record, self._source
        inflate = zlib.decompressobj(-15)
        left = record.nbytes + 1
        try:
            for at in range(0, record.stored_nbytes, _PIECE):
                waiting = source.read(record.offset + at, min(_PIECE, record.stored_nbytes - at))
                while waiting and left > 0 and not inflate.eof:
                    piece = inflate.decompress(waiting, min(_PIECE, left))
                    left -= len(piece)
                    waiting = inflate.unconsumed_tail
                    yield piece
        except zlib.error as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, reason: str) -> FormatError:
        return FormatError(f"record {self._record.name!r} is damaged: {reason}", offset=self._record.offset)


def inflates_like_a_bomb(record: Record) -> bool:
    """Far more than pickles, JSON and code do; zeros among weights may."""
    return record.compressed and record.nbytes > max(1 << 20, 32 * record.stored_nbytes)


def record_bytes(source: Source, record: Record, most: int) -> bytes | bytearray:
    """A small record's bytes, inflated where it is compressed, checked against its CRC.

    Raises:
        FormatError: Larger than `most`, or damaged.
    """
    if max(record.nbytes, record.stored_nbytes) > most:
        raise FormatError(f"record {record.name!r} claims {record.nbytes:,} bytes", offset=record.offset)
    if record.compressed:
        return Inflated(source, record)[:]
    data = source.read(record.offset, record.nbytes)
    if record.crc is not None and zlib_ng.crc32(data) != record.crc:
        raise FormatError(f"record {record.name!r} is damaged: its CRC-32 does not match", offset=record.offset)
    return data
