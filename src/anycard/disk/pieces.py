"""Bytes to be written: in memory, in another file, or made when their turn comes. Knows no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from zlib_ng import zlib_ng

from anycard.disk.source import Source
from anycard.errors import CheckpointError, FormatError


class Piece(Protocol):
    """Some bytes whose number is known before they are there.

    Attributes:
        nbytes: How many.
    """

    @property
    def nbytes(self) -> int: ...

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """The bytes in order, at most `chunk_nbytes` at once; a chunk is valid until the next one."""
        ...


class Bytes:
    """A buffer in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = _flat(memoryview(data))
        self.nbytes = len(self._view)

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        return _cut(self._view, chunk_nbytes)


class FileRange:
    """A range of a source, read in bounded chunks into one buffer that is used again.

    With `crc`, the CRC-32 that the bytes must have: FormatError (with `label`) once they have been read otherwise.
    """

    def __init__(self, source: Source, offset: int, nbytes: int, label: str = "", crc: int | None = None) -> None:
        self._source = source
        self._offset = offset
        self._label = label
        self._crc = crc
        self.nbytes = nbytes

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        buffer = memoryview(bytearray(min(chunk_nbytes, self.nbytes)))
        crc = 0
        for start in range(0, self.nbytes, chunk_nbytes):
            view = buffer[: min(chunk_nbytes, self.nbytes - start)]
            self._source.read_into(self._offset + start, view)
            crc = zlib_ng.crc32(view, crc)
            yield view
        if self._crc is not None and crc != self._crc:
            raise FormatError(
                f"{self._label} is damaged: its CRC-32 does not match", name=self._label, offset=self._offset
            )


class Lazy:
    """A buffer that is made when it is written, and let go of after."""

    def __init__(self, nbytes: int, make: Callable[[], memoryview]) -> None:
        self.nbytes = nbytes
        self._make = make

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        view = _flat(self._make())
        if len(view) != self.nbytes:
            raise CheckpointError(f"{self.nbytes:,} bytes were planned, {len(view):,} came")
        yield from _cut(view, chunk_nbytes)


class _Watched:
    """A piece that shows each of its chunks once it is used."""

    def __init__(self, piece: Piece, watch: Callable[[memoryview], object]) -> None:
        self._piece = piece
        self._watch = watch
        self.nbytes = piece.nbytes

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        for chunk in self._piece.chunks(chunk_nbytes):
            yield chunk
            self._watch(chunk)


def watched(piece: Piece, watch: Callable[[memoryview], object]) -> Piece:
    """The piece, with `watch` called with each chunk once it is used."""
    return _Watched(piece, watch)


def counted(piece: Piece, done: Callable[[int], None]) -> Piece:
    """The piece, with `done` called with the bytes of each chunk once it is used."""
    return _Watched(piece, lambda chunk: done(len(chunk)))


def _flat(view: memoryview) -> memoryview:
    if view.ndim == 1 and view.format == "B":
        return view
    return memoryview(b"") if view.nbytes == 0 else view.cast("B")


def _cut(view: memoryview, chunk_nbytes: int) -> Iterator[memoryview]:
    for start in range(0, len(view), chunk_nbytes):
        yield view[start : start + chunk_nbytes]
