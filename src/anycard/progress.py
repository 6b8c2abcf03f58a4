"""Progress of long work: nothing, a bar on stderr, or the caller's function of (done, total) bytes."""

from __future__ import annotations

import builtins
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
            if not nbytes:
                return
            with lock:  # pieces are written by several threads
                done = min(done + nbytes, total)
                progress(done, total)

        yield report
        if done < total:  # what needed no work after all
            report(total - done)


def on_terminal(stream: Any) -> bool:
    """People see what is written there; the program may have no such stream, or an object of its own."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def _in_notebook() -> bool:
    """stderr is no terminal there, and people see it all the same."""
    if not hasattr(builtins, "get_ipython"):  # only where IPython runs is rich, which takes a while, to be asked
        return False
    from rich.console import Console

    return Console(stderr=True).is_jupyter


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and rate, on a terminal or in a notebook only, once the work has taken a second."""
    notebook = _in_notebook()
    if not notebook and not on_terminal(sys.stderr):
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # A notebook shows what a terminal is sent; rich's own way there needs ipywidgets.
    console = Console(stderr=True, force_jupyter=False, force_terminal=True if notebook else None)
    bar = Progress(*columns, console=console, transient=True)
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
