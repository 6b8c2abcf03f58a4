"""Carry out reads: neighbours by one call, large ones in parts, straight to where they stay, by a few threads.

Knows no tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from anycard.disk.source import Source
from anycard.disk.threads import in_threads
from anycard.disk.vectors import MOST_ROWS, Table, memory
from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits

_GAP = 4096  # bytes between two jobs that are read rather than skipped: the padding of a zip record
_MOST_PIECES = MOST_ROWS // 2  # of one call: something may lie between any two
_ALIGNED = 16  # the largest element
_ROOM = _ALIGNED * _MOST_PIECES


class Reads(NamedTuple):
    """Stretches of a file, and the memory where each stays; a column for each thing known of them.

    Attributes:
        offsets: In bytes from the start of the source; int64, of shape (stretches,), as the next two.
        nbytes: How many.
        addresses: Of writable memory for as many bytes, which the caller keeps alive; uint64. Targets must not overlap.
        labels: What errors call them.
        crcs: CRC-32s that these very bytes must have, or None; none at all where there is nothing to check.
    """

    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    addresses: NDArray[np.uint64]
    labels: Sequence[str]
    crcs: Sequence[int | None] = ()


# Bytes that have come: of which stretch, from which of its bytes on, how many, and the address where they are.
Piece = tuple[int, int, int, int]


class Stage(Protocol):
    """Memory that bytes pass on the way to where they stay."""

    def buffer(self, nbytes: int) -> int:
        """The address of this thread's buffer, of so many bytes: the same number each time."""
        ...

    def take(self, pieces: Sequence[Piece]) -> None:
        """Bring what lies in this thread's buffer to where it stays."""
        ...


def run_reads(
    source: Source,
    reads: Reads,
    done: Callable[[int], None] | None = None,
    *,
    stage: Stage | None = None,
    limits: Limits = DEFAULT,
) -> None:
    """Fill memory from a file; every byte is read once.

    Args:
        done: Called with the bytes of each finished call, from one thread at a time.
        stage: What the bytes pass; the stretches' addresses are of no account then.

    Raises:
        FormatError: The file ends before a stretch does, or a CRC does not match (`.name`, `.offset`).
            Targets already filled keep their new bytes: the caller owns the way back.
        OSError: The disk failed; passed on as it came.
    """
    chunk = limits.chunk_nbytes if stage is None else _staged_chunk(limits)
    pieces = Pieces(reads, chunk)
    sums = _Sums(reads) if any(crc is not None for crc in reads.crcs) else None
    lock = threading.Lock()

    def work(rows: slice) -> None:
        address = pieces.address[rows]
        if stage is not None:
            address = pieces.staged(rows, stage.buffer(chunk + _ROOM))
        source.read_table(int(pieces.start[rows.start]), pieces.table(rows, address))
        if sums is not None:
            sums.take(pieces.come(rows, address))
        if stage is not None:
            stage.take(pieces.come(rows, address))
        if done is not None:
            with lock:
                done(int(pieces.nbytes[rows].sum()))

    in_threads(list(pieces.batches()), work, limits.threads)
    if sums is not None:
        sums.finish()


def _staged_chunk(limits: Limits) -> int:
    """What fits a buffer of a chunk, each piece aligned: pinned memory comes in powers of two."""
    room = limits.chunk_nbytes - _ROOM if limits.chunk_nbytes > 2 * _ROOM else limits.chunk_nbytes
    return max(_ALIGNED, room // _ALIGNED * _ALIGNED)


class Pieces:
    """The stretches in the order of the file, large ones in parts of at most `chunk` bytes: columns again."""

    def __init__(self, reads: Reads, chunk: int) -> None:
        offsets, nbytes, addresses = reads.offsets, reads.nbytes, reads.addresses
        order = np.argsort(offsets, kind="stable")
        order = order[nbytes[order] > 0]
        parts = -(-nbytes[order] // chunk)
        self.read = np.repeat(order, parts)  # which stretch a piece is of, and how far into it it begins
        self.into = (np.arange(len(self.read)) - np.repeat(np.cumsum(parts) - parts, parts)) * chunk
        self.start = offsets[self.read] + self.into
        self.nbytes = np.minimum(nbytes[self.read] - self.into, chunk)
        self.address = addresses[self.read] + self.into.astype(np.uint64)
        self._chunk = chunk
        self._ends = self.start + self.nbytes
        self._gaps = self.start[1:] - self._ends[:-1]
        self._scratch = np.empty(_GAP, np.uint8)

    def batches(self) -> Iterator[slice]:
        """Pieces for one call each: as few as the chunk, the system's most places and holes in the file allow."""
        breaks = np.flatnonzero((self._gaps < 0) | (self._gaps > _GAP)) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(self._ends)], strict=True):
            at = first
            while at < last:
                fitting = int(np.searchsorted(self._ends[at:last], self.start[at] + self._chunk, side="right"))
                rows = slice(at, at + min(max(fitting, 1), _MOST_PIECES))
                yield rows
                at = rows.stop

    def table(self, rows: slice, address: NDArray[np.uint64]) -> Table:
        """The places of these pieces; what lies between them goes where nobody looks."""
        table = np.empty((2 * (rows.stop - rows.start) - 1, 2), np.uint64)
        table[::2, 0], table[::2, 1] = address, self.nbytes[rows]
        table[1::2, 0], table[1::2, 1] = self._scratch.ctypes.data, self._gaps[rows.start : rows.stop - 1]
        return table[table[:, 1] > 0]

    def staged(self, rows: slice, buffer: int) -> NDArray[np.uint64]:
        """Addresses for these pieces in a buffer, each where elements of any size may begin."""
        room = -(-self.nbytes[rows] // _ALIGNED) * _ALIGNED
        places: NDArray[np.uint64] = (np.cumsum(room) - room + buffer).astype(np.uint64)
        return places

    def come(self, rows: slice, address: NDArray[np.uint64]) -> list[Piece]:
        """These pieces, once they are there."""
        columns = (self.read[rows].tolist(), self.into[rows].tolist(), self.nbytes[rows].tolist(), address.tolist())
        return list(zip(*columns, strict=True))


class _Sums:
    """CRCs of what has come, taken while it is warm."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._parts: dict[int, list[tuple[int, int, int]]] = {}

    def take(self, pieces: Sequence[Piece]) -> None:
        """Sum up pieces; a stretch that is one piece is checked at once."""
        reads = self._reads
        for index, into, nbytes, address in pieces:
            if reads.crcs[index] is None:
                continue
            crc = zlib_ng.crc32(memory(address, nbytes))
            if nbytes < reads.nbytes[index]:
                self._parts.setdefault(index, []).append((into, crc, nbytes))
            elif crc != reads.crcs[index]:
                raise self._damaged(index)

    def finish(self) -> None:
        """Check what came in parts."""
        for index, parts in self._parts.items():
            crc = 0
            for _, part, nbytes in sorted(parts):
                crc = zlib_ng.crc32_combine(crc, part, nbytes)
            if crc != self._reads.crcs[index]:
                raise self._damaged(index)

    def _damaged(self, index: int) -> FormatError:
        label = self._reads.labels[index]
        reason = "its CRC-32 does not match. Copy or download the file again."
        return FormatError(f"{label} is damaged: {reason}", offset=int(self._reads.offsets[index]), name=label)
