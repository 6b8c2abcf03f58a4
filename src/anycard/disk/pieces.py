"""What is to be written: bytes in memory, a range of another file, or bytes made when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from anycard.disk.source import Source


class Piece(Protocol):
    """A run of bytes of known size, given in chunks."""

    nbytes: int

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """The bytes in order, at most `chunk_nbytes` at once."""


class Lazy:
    """Bytes that are made when written, and let go after."""

    def __init__(self, nbytes: int, make: Callable[[], memoryview | bytes]) -> None:
        self.nbytes = nbytes
        self._make = make

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        view = memoryview(self._make())
        for start in range(0, self.nbytes, chunk_nbytes):
            yield view[start : start + chunk_nbytes]


class FileRange:
    """A range of another file, read in bounded chunks."""

    def __init__(self, source: Source, offset: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._source = source
        self._offset = offset

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        buffer = memoryview(bytearray(min(chunk_nbytes, self.nbytes)))
        for start in range(0, self.nbytes, chunk_nbytes):
            part = buffer[: min(chunk_nbytes, self.nbytes - start)]
            self._source.read_into(self._offset + start, part)
            yield part
