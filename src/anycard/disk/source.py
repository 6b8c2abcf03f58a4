"""Where bytes come from: a file on disk, or an open binary file. Knows no tensors."""

from __future__ import annotations

import io
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from itertools import repeat
from typing import BinaryIO

from anycard.arguments import path_text
from anycard.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.disk.vectors import Table

_HAS_PREAD = hasattr(os, "pread")  # Windows has none
_MOST = 0x7FFFF000  # preadv(2): Linux moves at most this many bytes a call


class Source:
    """A readable stretch of bytes; reading is safe from several threads.

    Attributes:
        name: What errors call it: the path as given, or the open file's own name.
        size: Bytes.
        path: Where the file is, if it was opened by its path.
        base: Where its byte 0 lies in the file behind it.
    """

    path: str | None = None
    base = 0

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` (writable, contiguous, uint8) from byte `offset`.

        Raises:
            FormatError: The file ends before.
            OSError: The disk failed; passed on as it came.
        """
        raise NotImplementedError

    def read_table(self, offset: int, table: Table) -> None:
        """Fill place after place from byte `offset` on; raises as `read_into` does."""
        from anycard.disk.vectors import memory  # here and below: it imports numpy

        for address, nbytes in table.tolist():
            self.read_into(offset, memory(address, nbytes))
            offset += nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from byte `offset`; FormatError where the file ends before."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise self._short(offset, nbytes)
        return self._read(offset, nbytes)

    def read_each(self, offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        """Many short stretches; FormatError where the file ends before one does."""
        return list(map(self.read, offsets, nbytes))

    def _read(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def origin(self, offset: int) -> tuple[Source, int]:
        """The source that really has a byte, and where; itself, but for a window on another."""
        return self, offset

    def mapped(self) -> mmap.mmap | None:
        """The file in memory, private to this process; None where it is no file of the disk's."""
        return None

    def close(self) -> None:
        """Let go of the file."""

    def _short(self, offset: int, nbytes: int) -> FormatError:
        return FormatError(
            f"{self.name} is cut short: {nbytes:,} bytes are needed from byte {offset:,}, "
            f"the file ends at {self.size:,}. Copy or download the file again.",
            path=self.name,
            offset=offset,
        )


class FileSource(Source):
    """A file by descriptor, read by `pread` (no shared position); one that is owned is closed when it is let go."""

    _fd = -1  # where making one fails before it has any

    def __init__(self, name: str, fd: int, *, owned: bool, base: int = 0) -> None:
        self._fd = fd
        self._owned = owned
        super().__init__(name, os.fstat(fd).st_size - base)
        self.base = base
        self._lock = threading.Lock()

    def mapped(self) -> mmap.mmap | None:
        try:
            return mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):  # a file system that maps nothing
            return None

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            moved = self._read_at(offset + done + self.base, view[done : done + _MOST])
            if moved == 0:
                raise self._short(offset, len(view))
            done += moved

    def read_table(self, offset: int, table: Table) -> None:
        from anycard.disk import vectors

        if not vectors.THERE:
            super().read_table(offset, table)
            return
        done, total, left = 0, int(table[:, 1].sum()), table
        while done < total:
            moved = vectors.read_table(self._fd, offset + done + self.base, left)
            if moved == 0:
                raise self._short(offset, total)
            done += moved
            left = vectors.rest_of(table, done) if done < total else left

    def read(self, offset: int, nbytes: int) -> bytes:
        if _HAS_PREAD and offset >= 0 and 0 <= nbytes <= _MOST and offset + nbytes <= self.size:
            data = os.pread(self._fd, nbytes, offset + self.base)  # no second copy, as through a bytearray
            if len(data) == nbytes:
                return data
        return super().read(offset, nbytes)

    def read_each(self, offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        if _HAS_PREAD and not self.base and min(offsets, default=0) >= 0:
            found = list(map(os.pread, repeat(self._fd), nbytes, offsets))
            if list(map(len, found)) == nbytes:
                return found
        return super().read_each(offsets, nbytes)

    def _read_at(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # Windows and macOS before 11 have no preadv
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._owned:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class StreamSource(Source):
    """An open binary file without a descriptor (BytesIO and kin), from where it stands."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._base = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(self._base)
        super().__init__(name, end - self._base)
        self._file = file
        self._lock = threading.Lock()

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._lock:
            self._file.seek(self._base + offset)
            done = 0
            while done < len(view):
                data = self._file.read(len(view) - done)
                if not data:
                    raise self._short(offset, len(view))
                view[done : done + len(data)] = data
                done += len(data)


class WindowSource(Source):
    """A part of another source."""

    def __init__(self, source: Source, offset: int, size: int) -> None:
        super().__init__(source.name, size)
        self._source, self._offset = source.origin(offset)

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > self.size:
            raise self._short(offset, len(view))
        self._source.read_into(self._offset + offset, view)

    def origin(self, offset: int) -> tuple[Source, int]:
        return self._source, self._offset + offset

    def close(self) -> None:
        self._source.close()


class MemorySource(Source):
    """Bytes that are in memory already."""

    def __init__(self, name: str, data: bytes) -> None:
        super().__init__(name, len(data))
        self._data = data

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > self.size:
            raise self._short(offset, len(view))
        view[:] = self._data[offset : offset + len(view)]

    def _read(self, offset: int, nbytes: int) -> bytes:
        return self._data[offset : offset + nbytes]


def open_source(file: str | os.PathLike[str] | BinaryIO) -> Source:
    """Open a path, or take an open binary file from where it stands.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Neither a path nor an open binary file.
    """
    if isinstance(file, (str, os.PathLike)):
        path = path_text(file)
        if os.path.isdir(path):  # noqa: PTH112 - a path of any kind, without importing pathlib
            from anycard.disk.folder import Folder

            return Folder(path)
        return open_file(path)
    if not hasattr(file, "read") or not hasattr(file, "seek"):
        raise TypeError(f"a path or an open binary file is needed, not {type(file).__name__}")
    if isinstance(file, io.TextIOBase):  # type: ignore[unreachable]
        raise TypeError("the file is open as text: open it with mode 'rb'")
    return StreamSource(str(getattr(file, "name", "<open file>")), file)


def open_file(path: str) -> Source:
    """Open a file by its path."""
    mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode):
        message = f"{path} is a pipe or a device, which cannot be read at an offset: put it into a file first"
        raise FormatError(message, path=path)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    source = FileSource(path, fd, owned=True)
    source.path = path
    return source
