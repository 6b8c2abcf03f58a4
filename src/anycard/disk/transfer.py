"""Carry out reads: small neighbours by one call, large ones in parts, straight to where they stay, by a few threads.

Knows no tensors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from zlib_ng import zlib_ng

from anycard.disk.source import Source
from anycard.disk.threads import in_threads
from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits

_GAP = 4096  # bytes between two jobs that are read rather than skipped: the padding of a zip record
_SMALL = 32 << 10  # up to here a copy out of a common buffer costs less than a place of its own in the read
_MOST_GROUP = 1 << 20  # such a buffer stays in the processor's cache


class ReadJob(NamedTuple):
    """Some bytes of a file, and the memory where they stay.

    Attributes:
        offset: In bytes from the start of the source.
        nbytes: How many.
        address: Of writable memory for as many bytes, which the caller keeps alive. Targets must not overlap.
        label: What errors call it.
        crc: CRC-32 that these very bytes must have, or None.
    """

    offset: int
    nbytes: int
    address: int
    label: str
    crc: int | None = None


class _Batch(NamedTuple):
    """One read: a part of a large job, or a group of small neighbours by way of a buffer.

    Attributes:
        start, nbytes: Where in the file.
        part: How far into its only job it begins; None for a group.
    """

    start: int
    nbytes: int
    jobs: Sequence[ReadJob]
    part: int | None


def memory(address: int, nbytes: int) -> memoryview:
    """The bytes at an address, writable; whoever asks keeps them alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B") if nbytes else memoryview(b"")


def run_reads(
    source: Source, jobs: Sequence[ReadJob], done: Callable[[int], None] | None = None, *, limits: Limits = DEFAULT
) -> None:
    """Fill memory from a file; every byte is read once.

    Args:
        done: Called with the bytes of each finished call, from one thread at a time.

    Raises:
        FormatError: The file ends before a job does, or a CRC does not match (`.name`, `.offset`).
            Targets already filled keep their new bytes: the caller owns the way back.
        OSError: The disk failed; passed on as it came.
    """
    sums: dict[ReadJob, list[tuple[int, int, int]]] = {}
    lock = threading.Lock()

    def work(batch: _Batch) -> None:
        nbytes = _run(source, batch, sums)
        if done is not None:
            with lock:
                done(nbytes)

    in_threads(list(_batches(sorted(job for job in jobs if job.nbytes), limits)), work, limits.threads)
    for job, parts in sums.items():
        _check_parts(job, parts)


def _batches(jobs: Sequence[ReadJob], limits: Limits) -> Iterator[_Batch]:
    """The jobs, in the order of their offsets, as reads."""
    most = min(_MOST_GROUP, limits.chunk_nbytes)
    group: list[ReadJob] = []
    start = end = 0
    for job in jobs:
        offset, nbytes = job.offset, job.nbytes
        small = nbytes <= _SMALL
        if group and not (small and end <= offset <= end + _GAP and offset + nbytes - start <= most):
            yield _Batch(start, end - start, group, None)
            group = []
        if not small:
            for part in range(0, nbytes, limits.chunk_nbytes):
                yield _Batch(offset + part, min(limits.chunk_nbytes, nbytes - part), (job,), part)
            continue
        if not group:
            start = offset
        group.append(job)
        end = offset + nbytes
    if group:
        yield _Batch(start, end - start, group, None)


def _run(source: Source, batch: _Batch, sums: dict[ReadJob, list[tuple[int, int, int]]]) -> int:
    """Read one batch; gives the bytes that its jobs got."""
    if batch.part is None:
        return _read_group(source, batch)
    job = batch.jobs[0]
    view = memory(job.address + batch.part, batch.nbytes)
    source.read_into(batch.start, view)
    if job.crc is not None:
        sums.setdefault(job, []).append((batch.part, zlib_ng.crc32(view), batch.nbytes))
    return batch.nbytes


def _read_group(source: Source, batch: _Batch) -> int:
    data = bytearray(batch.nbytes)
    view = memoryview(data)
    source.read_into(batch.start, view)
    base = ctypes.addressof(ctypes.c_char.from_buffer(data))
    total = 0
    for offset, nbytes, address, label, crc in batch.jobs:
        at = offset - batch.start
        if crc is not None and zlib_ng.crc32(view[at : at + nbytes]) != crc:
            raise _damaged(label, offset)
        ctypes.memmove(address, base + at, nbytes)
        total += nbytes
    return total


def _check_parts(job: ReadJob, parts: list[tuple[int, int, int]]) -> None:
    crc = 0
    for _, part, nbytes in sorted(parts):
        crc = zlib_ng.crc32_combine(crc, part, nbytes)
    if crc != job.crc:
        raise _damaged(job.label, job.offset)


def _damaged(label: str, offset: int) -> FormatError:
    reason = "its CRC-32 does not match. Copy or download the file again."
    return FormatError(f"{label} is damaged: {reason}", offset=offset, name=label)
