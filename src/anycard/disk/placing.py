"""Carry out writes: pieces at places that are known before the first byte, by a few threads. Knows no tensors."""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Generic, NamedTuple, Protocol, TypeVar

from anycard.disk.pieces import Piece
from anycard.disk.threads import in_threads
from anycard.errors import CheckpointError
from anycard.limits import Limits

_SMALL = 32 << 10  # up to here pieces are put together, with what stands before them, for one write
_MOST_GROUP = 1 << 20
_EARLY = 1 << 20
_PAGE = mmap.PAGESIZE


class Digest(Protocol):
    """Takes a piece's bytes in order."""

    def update(self, data: memoryview, /) -> object: ...


D = TypeVar("D", bound=Digest)


class Placed(NamedTuple):
    """A piece, what errors call it, and where its first byte goes, counted from where the file stands."""

    offset: int
    piece: Piece
    label: str


class _Target:
    """A file by places: by descriptor, or one thread at a time where it has none."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._base = file.tell()
        self._lock = threading.Lock()
        self._fd: int | None = None
        with contextlib.suppress(OSError, io.UnsupportedOperation, AttributeError):
            if hasattr(os, "pwritev"):
                file.flush()
                self._fd = file.fileno()

    def reserve(self, nbytes: int) -> None:
        """Ask for the room at once, so that a full disk is told before the first byte."""
        if self._fd is None or not nbytes or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, self._base, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                raise

    def write(self, offset: int, *parts: bytes | memoryview) -> None:
        """Write all of them, one after the other."""
        if self._fd is None:
            with self._lock:
                self._file.seek(self._base + offset)
                self._file.writelines(parts)
            return
        views, at = [memoryview(part) for part in parts if part], self._base + offset
        while views:
            moved = os.pwritev(self._fd, views, at)
            at += moved
            while views and moved >= len(views[0]):
                moved -= len(views.pop(0))
            if moved:
                views[0] = views[0][moved:]
        if at - self._base - offset >= _EARLY and sys.platform == "linux":
            # Starts to write these pages back, so that fsync finds little to do; not those that it shares with
            # neighbours, whose own bytes would have to wait for the disk.
            start = -(-(self._base + offset) // _PAGE) * _PAGE
            os.posix_fadvise(self._fd, start, at // _PAGE * _PAGE - start, os.POSIX_FADV_DONTNEED)

    def finish(self, end: int) -> None:
        """The file stands behind what was written."""
        self._file.seek(self._base + end)


def run_writes(
    file: BinaryIO,
    placed: Sequence[Placed],
    digest: Callable[[], D],
    limits: Limits,
    *,
    total: int,
    before: Callable[[int, D], bytes] = lambda index, digest: b"",
) -> list[D]:
    """Write pieces, which are in the order of their places, from where the (seekable) file stands.

    Args:
        digest: Makes what each piece's bytes go through.
        total: Bytes that the file will have from where it stands.
        before: Gives what stands right before a piece once its digest is known: a zip's local header.

    Returns:
        The digests, in the pieces' order; the file stands at `total`.

    Raises:
        CheckpointError: A piece gave other bytes than planned; names it.
        OSError: The disk failed or is full.
    """
    return _Writes(_Target(file), placed, [digest() for _ in placed], before, limits).run(total)


class _Writes(Generic[D]):
    def __init__(
        self,
        target: _Target,
        placed: Sequence[Placed],
        digests: list[D],
        before: Callable[[int, D], bytes],
        limits: Limits,
    ) -> None:
        self._target = target
        self._placed = placed
        self._digests = digests
        self._before = before
        self._limits = limits

    def run(self, total: int) -> list[D]:
        self._target.reserve(total)
        in_threads(list(self._groups()), self._write, self._limits.threads)
        self._target.finish(total)
        return self._digests

    def _groups(self) -> Iterator[range]:
        """Indices of small neighbours; each large piece for itself."""
        first = nbytes = 0
        for index, (_, piece, _) in enumerate(self._placed):
            if piece.nbytes > _SMALL or nbytes > _MOST_GROUP:
                yield range(first, index)
                first, nbytes = index, 0
            if piece.nbytes > _SMALL:
                yield range(index, index + 1)
                first = index + 1
            nbytes += piece.nbytes
        yield range(first, len(self._placed))

    def _write(self, group: range) -> None:
        if len(group) == 1 and self._placed[group[0]].piece.nbytes > _SMALL:
            self._write_large(group[0])
        elif group:
            self._write_together(group)

    def _write_large(self, index: int) -> None:
        offset, piece, _ = self._placed[index]
        done = 0
        for chunk in self._chunks(index):
            whole = len(chunk) == piece.nbytes  # its digest is known, so that what stands before it goes along
            head = self._before(index, self._digests[index]) if whole else b""
            self._target.write(offset + done - len(head), head, chunk)
            done += len(chunk)
        if not whole and (head := self._before(index, self._digests[index])):
            self._target.write(offset - len(head), head)

    def _write_together(self, group: range) -> None:
        parts: list[bytes] = []
        start = end = -1
        for index in group:
            data = b"".join(map(bytes, self._chunks(index)))  # a chunk is valid until the next one
            head = self._before(index, self._digests[index])
            place = self._placed[index].offset - len(head)
            if place != end and parts:
                self._target.write(start, b"".join(parts))
                parts = []
            start = start if parts else place
            parts += (head, data)
            end = self._placed[index].offset + len(data)
        self._target.write(start, b"".join(parts))

    def _chunks(self, index: int) -> Iterator[memoryview]:
        """A piece's bytes, through its digest."""
        _, piece, label = self._placed[index]
        update, done = self._digests[index].update, 0
        for chunk in piece.chunks(self._limits.chunk_nbytes):
            done += len(chunk)
            if done <= piece.nbytes:
                update(chunk)
                yield chunk
        if done != piece.nbytes:
            raise CheckpointError(f"{label}: {piece.nbytes:,} bytes were planned, {done:,} came", name=label)
