"""The clock and the counters of one run, and the state of the page cache before it. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_WARM, _COLD = 0.99, 0.01
_CHUNK = 8 << 20
_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


@dataclass(frozen=True)
class Measured:
    """One run: seconds, bytes and calls. `peak_nbytes` is memory above what the process held before."""

    seconds: float
    peak_nbytes: int
    read_nbytes: int
    read_calls: int
    write_calls: int
    cached: float | None

    def as_data(self) -> dict[str, float | int | None]:
        """For JSON."""
        return asdict(self)


def measured(act: Callable[[], Any], cached: float | None = None) -> tuple[Any, Measured]:
    """Run once, with the clock as close to it as can be."""
    trim = getattr(_LIBC, "malloc_trim", None)  # glibc keeps what was freed, and would not be seen to take it again
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is held now
    held = _status("VmRSS")
    before = _io()
    start = time.perf_counter()
    result = act()
    seconds = time.perf_counter() - start
    after = _io()
    peak = getattr(result, "peak_nbytes", None)  # of a process of its own
    if peak is None:
        peak = max(0, _status("VmHWM") - held)
    calls = {key: after[key] - before[key] for key in after}
    return result, Measured(seconds, peak, calls["rchar"], calls["syscr"], calls["syscw"], cached)


def prepare_cache(path: Path, state: str) -> float:
    """Make a file warm or cold; the share of its pages that is in the page cache, proved.

    Raises:
        RuntimeError: The page cache did not do as asked.
    """
    _warm(path) if state == "warm" else _cool(path)
    share = cached_share(path)
    if share < _WARM if state == "warm" else share >= _COLD:
        raise RuntimeError(f"the file is not {state}: {share:.1%} of its pages are in the page cache")
    return share


def cached_share(path: Path) -> float:
    """How much of a file is in the page cache: mincore(2) over a mapping of it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if _LIBC.mincore(address, size, pages):
            raise OSError(ctypes.get_errno(), "mincore")
        _LIBC.munmap(address, size)
        return sum(pages.raw.count(bytes([odd])) for odd in range(1, 256, 2)) / len(pages.raw)
    finally:
        os.close(fd)


def touch_memory(nbytes: int) -> None:
    """Take fresh memory and give it back: a virtual machine's host may have to find the pages first."""
    with mmap.mmap(-1, max(nbytes, mmap.PAGESIZE)) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


def touch_disk(folder: Path, nbytes: int) -> None:
    """Write a file, and give its blocks back: a virtual disk is several times slower where nothing was ever written."""
    place = folder / "touched"
    with place.open("wb", buffering=0) as file:
        for start in range(0, nbytes, _CHUNK):
            file.write(b"\xa5" * min(_CHUNK, nbytes - start))
        os.fsync(file.fileno())
    place.unlink()
    os.sync()  # freed blocks can be had again once the journal is written


def _warm(path: Path) -> None:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _cool(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _io() -> dict[str, int]:
    text = Path("/proc/self/io").read_text()
    return {key: int(value) for key, _, value in (line.partition(": ") for line in text.splitlines())}
