"""Share work among a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_threads(items: Sequence[T], work: Callable[[T], None], threads: int) -> None:
    """Do `work` for each item, in their order but for `threads` of them at a time; the first error is raised.

    No item is worked on once this has ended, however it ends: helpers write into memory and files of the caller's.
    """
    todo = iter(items)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not errors:
                with lock:
                    item = next(todo, None)
                if item is None:
                    return
                work(item)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            errors.append(error)

    helpers = [_Helper(run) for _ in range(min(threads, len(items)) - 1)]
    try:
        for helper in helpers:
            helper.start()
        run()
    except BaseException as error:  # noqa: BLE001 - an interrupt, or no room for one more thread
        errors.append(error)
    while True:
        try:
            for helper in helpers:
                helper.wait()
            break
        except BaseException as error:  # noqa: BLE001 - an interrupt; raised once all have ended
            errors.append(error)
    if errors:
        raise errors[0]


class _Helper(threading.Thread):
    """A thread whose end can be waited for in spite of interrupts.

    Up to Python 3.12 an interrupted `join` takes a thread that still runs for ended, and an interrupted `start` leaves
    one that does not count as alive yet. A lock that is held while the work is done tells the truth.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self._work = work
        self._working = threading.Lock()

    def run(self) -> None:
        """Called in the thread."""
        with self._working:
            self._work()

    def wait(self) -> None:
        """Until its work is done. Where that has not begun, there is to be none left by now, or an error to meet."""
        with self._working:
            pass
        if self.is_alive():
            self.join()
