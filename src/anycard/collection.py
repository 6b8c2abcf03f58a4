"""Put off Python's cycle collector while many small objects are made that all stay.

One full collection with torch loaded takes as long as reading a model of 0.2 GB; nothing here makes cycles.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection within, unless the caller had it off anyway."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
