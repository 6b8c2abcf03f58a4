"""Bare loops without any format: what the machine gives. Every ratio to a floor is a ratio to one of these."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK = 8 << 20


def read_all(path: Path, target: memoryview) -> None:
    """A whole file into memory that is there: preadv, two threads, 8 MiB a call."""
    fd = os.open(path, os.O_RDONLY)
    try:

        def take(start: int, stop: int) -> None:
            while start < stop:
                start += os.preadv(fd, [target[start:stop]], start)

        in_threads(take, len(target), 2)
    finally:
        os.close(fd)


def write_all(path: Path, data: memoryview) -> None:
    """fallocate, write, fsync; one thread, as the plainest durable loop has."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(fd, 0, len(data))
        for start in range(0, len(data), CHUNK):
            _write_chunk(fd, data, start)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_chunk(fd: int, data: memoryview, start: int) -> None:
    stop = min(start + CHUNK, len(data))
    while start < stop:
        start += os.pwrite(fd, data[start:stop], start)


def hash_all(path: Path, digest: Callable[[memoryview], object]) -> dict[int, object]:
    """Read a file and hash its chunks, a thread a core, each with a buffer of its own: chunk's offset -> digest."""
    fd = os.open(path, os.O_RDONLY)
    found: dict[int, object] = {}
    buffers: dict[int, memoryview] = {}
    try:

        def take(start: int, stop: int) -> None:
            whole = buffers.setdefault(threading.get_ident(), memoryview(bytearray(CHUNK)))
            part = whole[: stop - start]
            done = 0
            while done < len(part):
                done += os.preadv(fd, [part[done:]], start + done)
            found[start] = digest(part)

        in_threads(take, os.fstat(fd).st_size, os.cpu_count() or 1)
    finally:
        os.close(fd)
    return found


def in_threads(take: Callable[[int, int], None], size: int, threads: int) -> None:
    """`take(start, stop)` for every chunk, by threads that each fetch the next one.

    Raises:
        BaseException: What a thread met first.
    """
    jobs = iter(range(0, size, CHUNK))  # next() of a range holds the interpreter's lock: each job is given once
    failures: list[BaseException] = []

    def work(jobs: Iterator[int]) -> None:
        try:
            for start in jobs:
                take(start, min(start + CHUNK, size))
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    workers = [threading.Thread(target=work, args=(jobs,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
