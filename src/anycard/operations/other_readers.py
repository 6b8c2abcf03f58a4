"""What Python's own `zipfile` finds in an archive, as `numpy.load` and others read by it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from typing import Any

from anycard.containers.zip_directory import Record
from anycard.disk.source import Source

_LOCAL = 30  # bytes of a record's own header before its name


class _File(io.RawIOBase):
    """A source as a file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        nbytes = max(0, min(len(buffer), self._source.size - self._at))
        buffer[:nbytes] = self._source.read(self._at, nbytes)
        self._at += nbytes
        return nbytes


def finds_others(source: Source, records: Iterable[Record]) -> bool:
    """`zipfile` reads the archive, and finds members where these records are not."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_File(source))) as archive:
            found = {_data_offset(source, info.header_offset) for info in archive.infolist()}
    except Exception:  # noqa: BLE001 - of a damaged archive it raises whatever comes; then it reads nothing
        return False
    return found != {record.offset for record in records}


def _data_offset(source: Source, header: int) -> int:
    fixed = source.read(header, _LOCAL)
    return header + _LOCAL + int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")
