"""Room for what is nested deeper than Python's recursion limit lets its own pickler go; C's takes it."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_FRAMES = 20_000
_STACK_NBYTES = 256 << 20  # below Python 3.11 every frame takes of the thread's own stack; only what is used is memory
_lock = threading.Lock()


def deeply(make: Callable[[], T]) -> T:
    """What `make` gives. Where it is too deep, it is called again in a thread with more room.

    Raises:
        RecursionError: That was not enough.
    """
    try:
        return make()
    except RecursionError:
        pass
    made: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:  # noqa: BLE001 - raised where the caller waits
            raised.append(error)

    with _lock, _more_frames():
        size = threading.stack_size(_STACK_NBYTES)
        try:
            thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
            thread.start()
        finally:
            threading.stack_size(size)
        thread.join()
    if raised:
        raise raised[0]
    return made[0]


@contextmanager
def _more_frames() -> Iterator[None]:
    """The limit is the process's, not a thread's."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _FRAMES))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
