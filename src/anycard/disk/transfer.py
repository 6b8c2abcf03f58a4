"""Carry out reads: many small jobs sorted, grouped into vectored calls, run by a few threads. Knows no tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from zlib_ng import zlib_ng

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits

_GAP = 4096  # bytes between two jobs that are read rather than skipped: the padding of a zip record
_MOST_VIEWS = 512  # preadv takes 1,024 buffers a call; every job may need one for the gap before it


class ReadJob(NamedTuple):
    """Some bytes of a file, and the memory where they stay.

    Attributes:
        offset: In bytes from the start of the source.
        target: Writable, contiguous, uint8, shape (nbytes,). Targets must not overlap.
        label: What errors call it.
        crc: CRC-32 that these very bytes must have, or None.
    """

    offset: int
    target: memoryview
    label: str
    crc: int | None = None


@dataclass
class _Batch:
    """One vectored read: neighbours in the file, gaps included; or a part of one large job."""

    offset: int
    views: list[memoryview] = field(default_factory=list)
    sums: list[tuple[int, int, int]] = field(default_factory=list)  # job, start within it, place in `views`
    nbytes: int = 0  # of jobs, without gaps


def run_reads(
    source: Source, jobs: Sequence[ReadJob], done: Callable[[int], None] | None = None, *, limits: Limits = DEFAULT
) -> None:
    """Fill memory from a file; every byte is read once, straight to where it stays.

    Args:
        done: Called with the bytes of each finished call, from one thread at a time.

    Raises:
        FormatError: The file ends before a job does, or a CRC does not match (`.name`, `.offset`).
            Targets already filled keep their new bytes: the caller owns the way back.
        OSError: The disk failed; passed on as it came.
    """
    order = sorted(range(len(jobs)), key=lambda index: jobs[index].offset)
    batches = list(_batches(jobs, order, limits))
    found: dict[int, list[tuple[int, int, int]]] = {}
    _in_threads(source, batches, found, done or (lambda nbytes: None), limits)
    for index, parts in found.items():
        _check(jobs[index], parts)


def _batches(jobs: Sequence[ReadJob], order: Sequence[int], limits: Limits) -> Iterator[_Batch]:
    scratch = memoryview(bytearray(_GAP))
    batch = _Batch(0)
    end = -1
    for index in order:
        job = jobs[index]
        size = len(job.target)
        if size > limits.chunk_nbytes:
            yield from _split(job, index, limits)
            continue
        gap = job.offset - end
        full = batch.nbytes + size > limits.chunk_nbytes or len(batch.views) >= _MOST_VIEWS
        if full or not 0 <= gap <= _GAP or not batch.views:
            if batch.views:
                yield batch
            batch = _Batch(job.offset)
        elif gap:
            batch.views.append(scratch[:gap])
        if job.crc is not None:
            batch.sums.append((index, 0, len(batch.views)))
        batch.views.append(job.target)
        batch.nbytes += size
        end = job.offset + size
    if batch.views:
        yield batch


def _split(job: ReadJob, index: int, limits: Limits) -> Iterator[_Batch]:
    for start in range(0, len(job.target), limits.chunk_nbytes):
        view = job.target[start : start + limits.chunk_nbytes]
        sums = [(index, start, 0)] if job.crc is not None else []
        yield _Batch(job.offset + start, [view], sums, len(view))


def _in_threads(
    source: Source,
    batches: Sequence[_Batch],
    found: dict[int, list[tuple[int, int, int]]],
    done: Callable[[int], None],
    limits: Limits,
) -> None:
    todo = iter(batches)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with lock:
                    batch = next(todo, None)
                if batch is None:
                    return
                source.read_into_all(batch.offset, batch.views)
                sums = [(job, start, _summed(batch.views[place])) for job, start, place in batch.sums]
                with lock:
                    for job, start, (crc, nbytes) in sums:
                        found.setdefault(job, []).append((start, crc, nbytes))
                    done(batch.nbytes)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            errors.append(error)

    helpers = [threading.Thread(target=work) for _ in range(min(limits.threads, len(batches)) - 1)]
    for helper in helpers:
        helper.start()
    try:
        work()
    finally:
        for helper in helpers:
            helper.join()
    if errors:
        raise errors[0]


def _summed(view: memoryview) -> tuple[int, int]:
    return zlib_ng.crc32(view), len(view)


def _check(job: ReadJob, parts: list[tuple[int, int, int]]) -> None:
    crc = 0
    for _, part, nbytes in sorted(parts):
        crc = zlib_ng.crc32_combine(crc, part, nbytes)
    if crc != job.crc:
        raise FormatError(
            f"{job.label} is damaged: its CRC-32 does not match. Copy or download the file again.",
            offset=job.offset,
            name=job.label,
        )
