"""A copy of many places in memory, made by few system calls, for the case that they have to be put back.

Linux has files that lie in memory and have no name (memfd_create(2)): to copy thousands of small tensors into one
takes less than half of what a copy of each takes. Few large ones are copied into memory of the process, which may
have been in use before; a file's pages are always fresh.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from anycard.disk import vectors
from anycard.disk.source import FileSource, MemorySource, Source
from anycard.disk.transfer import Pieces, Reads
from anycard.limits import DEFAULT

_NAME = "the way back"
_MANY = 64  # places; a load may keep copies of few for each of many modules, and descriptors are few
_SMALL = 64 << 10  # bytes of the average place


def keep(addresses: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> Source:
    """What stands in these places now, one after the other; to be closed when it is of no more use.

    The places are to be alive and of the sizes given.
    """
    many_small = len(nbytes) >= _MANY and nbytes.sum() < _SMALL * len(nbytes)
    fd = _unnamed_file() if many_small else -1
    if fd < 0:
        return _in_memory(addresses, nbytes)
    try:
        reads = Reads(np.cumsum(nbytes) - nbytes, nbytes, addresses, ())
        pieces = Pieces(reads, DEFAULT.chunk_nbytes)
        for rows in pieces.batches():  # one writes at a time anyhow
            _write(fd, int(pieces.start[rows.start]), pieces.table(rows, pieces.address[rows]))
    except OSError:  # no room for files in memory (a container may bound them)
        os.close(fd)
        return _in_memory(addresses, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return FileSource(_NAME, fd, owned=True)


def _write(fd: int, start: int, table: vectors.Table) -> None:
    done, total, left = 0, int(table[:, 1].sum()), table
    while done < total:
        done += vectors.write_table(fd, start + done, left)
        left = vectors.rest_of(table, done) if done < total else left


def _unnamed_file() -> int:
    """A descriptor; -1 where the system has none to give."""
    if not (hasattr(os, "memfd_create") and vectors.THERE):
        return -1
    try:
        return os.memfd_create("anycard")
    except OSError:
        return -1


def _in_memory(addresses: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> Source:
    return MemorySource(_NAME, b"".join(map(vectors.memory, addresses.tolist(), nbytes.tolist())))
