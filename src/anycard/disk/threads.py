"""Share work among a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_threads(items: Sequence[T], work: Callable[[T], None], threads: int) -> None:
    """Do `work` for each item, in their order but for `threads` of them at a time; the first error is raised."""
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

    helpers = [threading.Thread(target=run) for _ in range(min(threads, len(items)) - 1)]
    for helper in helpers:
        helper.start()
    try:
        run()
    finally:
        for helper in helpers:
            _join(helper, errors)
    if errors:
        raise errors[0]


def _join(helper: threading.Thread, errors: list[BaseException]) -> None:
    """Wait for a helper's end, whatever comes meanwhile: it writes into memory that is the caller's."""
    while helper.is_alive():
        try:
            helper.join()
        except BaseException as error:  # noqa: BLE001 - an interrupt; raised by the caller, once all have ended
            errors.append(error)
