"""Make a find smaller, as long as it shows the same fault.

    python -m fuzz.minimising FILE READER SECONDS     # FILE is replaced; says what is wrong with it, or "well"

In a process of its own, without atheris: what only the instrumented reader shows is no find.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fuzz.ends import End, end_of
from fuzz.layers import layers
from fuzz.readers import READERS

Shows = Callable[[bytes], bool]


def minimised(data: bytes, shows: Shows, seconds: float) -> bytes:
    """Without the parts, of the file and of what lies within it, that the fault does not need."""
    until = time.monotonic() + seconds
    before = b""
    while before != data and time.monotonic() < until:
        before = data
        for which in range(len(layers(data))):
            held = layers(data)
            if which < len(held) and time.monotonic() < until:
                data = _smaller(data, which, shows, until)
    return data


def _smaller(data: bytes, which: int, shows: Shows, until: float) -> bytes:
    """One layer dropped, or without runs of bytes: halves first, then single ones."""
    layer = layers(data)[which]
    if layer.droppable and shows(new := layer.rebuilt(None)):
        return new
    held = layer.data
    step = max(len(held) // 2, 1)
    while step and held:
        at = 0
        while at < len(held) and time.monotonic() < until:
            less = held[:at] + held[at + step :]
            if shows(new := layer.rebuilt(less)):
                held, data = less, new
            else:
                at += step
        step //= 2
    return data


def main(file: Path, reader: str, seconds: float) -> End:
    """The find's end without instrumentation; the file made smaller where it is one."""
    folder = READERS[reader].folder
    want = end_of(file.read_bytes(), folder)
    if want.kind != "well":
        small = minimised(file.read_bytes(), lambda data: end_of(data, folder)[:2] == want[:2], seconds)
        file.write_bytes(small)
    return want


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
