"""Progress of long work: nothing, a bar on stderr, or the caller's function of (done, total) bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
