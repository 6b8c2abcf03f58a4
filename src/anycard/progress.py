"""Progress of long work: nothing, a bar on stderr, or the caller's function of (done, total) bytes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 1.0  # seconds that work may take without a bar

Progress = bool | Callable[[int, int], None] | None


@contextmanager
def counting(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the bytes moved since the last call."""
    if progress is None or progress is False:
        yield lambda nbytes: None
    elif progress is True:
        with _bar(total) as advance:
            yield advance
    else:
        done, lock = 0, threading.Lock()

        def report(nbytes: int) -> None:
            nonlocal done
            with lock:  # pieces are written by several threads
                done += nbytes
                progress(done, total)

        yield report


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and rate, on a terminal only, once the work has taken a second."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    start, done = time.monotonic(), 0
    task: TaskID | None = None
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal done, task
        with lock:
            done += nbytes
            if task is not None:
                bar.update(task, completed=done)
            elif time.monotonic() - start > _PATIENCE:
                task = bar.add_task("", total=total, completed=done)
                bar.start()

    try:
        yield advance
    finally:
        bar.stop()
