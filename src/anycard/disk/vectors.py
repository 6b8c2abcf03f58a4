"""Many places in memory by one system call: preadv(2), pwritev(2) on addresses, with no Python object for each place.

A table has a row for each place, (address, bytes), as the system's `struct iovec` has it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.uint64]  # of shape (places, 2)
MOST_ROWS = 1024  # Linux's IOV_MAX


def _system(name: str) -> Any:
    """The C library's function, whose offsets have 64 bits; None where it has none (Windows, macOS before 11)."""
    if sys.platform == "win32" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
        found.restype = ctypes.c_ssize_t
    return found


_PREADV = _system("preadv")
_PWRITEV = _system("pwritev")
THERE = _PREADV is not None and _PWRITEV is not None


def memory(address: int, nbytes: int) -> memoryview:
    """The bytes at an address, writable; whoever asks keeps them alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B") if nbytes else memoryview(bytearray())


def read_table(fd: int, offset: int, table: Table) -> int:
    """Read on from byte `offset` into place after place, at most `MOST_ROWS`; gives the bytes that came, maybe fewer.

    Raises:
        OSError: The disk failed.
    """
    return _moved(_PREADV, fd, offset, table)


def write_table(fd: int, offset: int, table: Table) -> int:
    """Write place after place from byte `offset` on, at most `MOST_ROWS`; gives the bytes that went, maybe fewer.

    Raises:
        OSError: The disk failed or is full.
    """
    return _moved(_PWRITEV, fd, offset, table)


def _moved(call: Any, fd: int, offset: int, table: Table) -> int:
    while True:
        moved: int = call(fd, table.ctypes.data, len(table), offset)
        if moved >= 0:
            return moved
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def rest_of(table: Table, done: int) -> Table:
    """The places that are left once so many bytes have come."""
    ends = np.cumsum(table[:, 1])
    first = int(np.searchsorted(ends, done, side="right"))
    left = table[first:].copy()
    if len(left):
        into = np.uint64(done - int(ends[first] - table[first, 1]))
        left[0] += np.array([into, 0], np.uint64)
        left[0, 1] -= into
    return left
