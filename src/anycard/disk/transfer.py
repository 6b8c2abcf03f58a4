"""Carry out reads: neighbours by one call, large ones in parts, straight to where they stay, by a few threads.

Knows no tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from anycard.disk.source import Source
from anycard.disk.threads import in_threads
from anycard.disk.vectors import MOST_ROWS, Table, memory
from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits

_GAP = 4096  # bytes between two jobs that are read rather than skipped: the padding of a zip record


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


class Batch(NamedTuple):
    """One call: from byte `start`, into the table's places. `rows`: which places of all."""

    start: int
    table: Table
    rows: slice


def run_reads(
    source: Source, reads: Reads, done: Callable[[int], None] | None = None, *, limits: Limits = DEFAULT
) -> None:
    """Fill memory from a file; every byte is read once.

    Args:
        done: Called with the bytes of each finished call, from one thread at a time.

    Raises:
        FormatError: The file ends before a stretch does, or a CRC does not match (`.name`, `.offset`).
            Targets already filled keep their new bytes: the caller owns the way back.
        OSError: The disk failed; passed on as it came.
    """
    pieces = Pieces(reads, limits)
    sums = _Sums(reads, pieces) if any(crc is not None for crc in reads.crcs) else None
    lock = threading.Lock()

    def work(batch: Batch) -> None:
        source.read_table(batch.start, batch.table)
        if sums is not None:
            sums.take(batch.rows)
        if done is not None:
            with lock:
                done(int(pieces.nbytes[batch.rows].sum()))

    in_threads(list(pieces.batches(limits)), work, limits.threads)
    if sums is not None:
        sums.finish()


class Pieces:
    """The stretches in the order of the file, large ones in parts: columns again."""

    def __init__(self, reads: Reads, limits: Limits) -> None:
        offsets, nbytes, addresses = reads.offsets, reads.nbytes, reads.addresses
        order = np.argsort(offsets, kind="stable")
        order = order[nbytes[order] > 0]
        chunk = limits.chunk_nbytes
        parts = -(-nbytes[order] // chunk)
        self.read = np.repeat(order, parts)  # which stretch a piece is of, and how far into it it begins
        self.into = (np.arange(len(self.read)) - np.repeat(np.cumsum(parts) - parts, parts)) * chunk
        self.start = offsets[self.read] + self.into
        self.nbytes = np.minimum(nbytes[self.read] - self.into, chunk)
        self.address = addresses[self.read] + self.into.astype(np.uint64)
        self._scratch = np.empty(_GAP, np.uint8)

    def batches(self, limits: Limits) -> Iterator[Batch]:
        """As few calls as the chunk's size, the system's most places and holes in the file allow."""
        ends = self.start + self.nbytes
        gaps = self.start[1:] - ends[:-1]
        breaks = np.flatnonzero((gaps < 0) | (gaps > _GAP)) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ends)], strict=True):
            at = first
            while at < last:
                fitting = int(np.searchsorted(ends[at:last], self.start[at] + limits.chunk_nbytes, side="right"))
                rows = slice(at, at + min(max(fitting, 1), MOST_ROWS // 2))
                yield Batch(int(self.start[at]), self._table(rows, gaps), rows)
                at = rows.stop

    def _table(self, rows: slice, gaps: NDArray[np.int64]) -> Table:
        """The places of these pieces; what lies between them goes where nobody looks."""
        table = np.empty((2 * (rows.stop - rows.start) - 1, 2), np.uint64)
        table[::2, 0], table[::2, 1] = self.address[rows], self.nbytes[rows]
        table[1::2, 0], table[1::2, 1] = self._scratch.ctypes.data, gaps[rows.start : rows.stop - 1]
        return table[table[:, 1] > 0]


class _Sums:
    """CRCs of what has come, taken while it is warm."""

    def __init__(self, reads: Reads, pieces: Pieces) -> None:
        self._reads = reads
        self._pieces = pieces
        self._parts: dict[int, list[tuple[int, int, int]]] = {}

    def take(self, rows: slice) -> None:
        """Sum up pieces; a stretch that is one piece is checked at once."""
        pieces, reads = self._pieces, self._reads
        columns = (pieces.read, pieces.into, pieces.nbytes, pieces.address)
        for index, into, nbytes, address in zip(*(column[rows].tolist() for column in columns), strict=True):
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
