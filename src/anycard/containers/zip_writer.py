"""Zip archives, stored only, laid out before the first byte is written. Knows no tensors.

Source: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5. The padding field "FB" is PyTorch's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from zlib_ng import zlib_ng

from anycard.disk.pieces import Piece
from anycard.disk.placing import Placed, run_writes
from anycard.errors import CheckpointError
from anycard.limits import Limits

ALIGNMENT = 64
_U32 = 0xFFFFFFFF  # from here on a 32-bit field says "see the zip64 field"; tests lower it
_U16 = 0xFFFF
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_PADDING = 0x4246
_UTF8 = 0x0800


@dataclass(slots=True)
class _Record:
    """A record, and where it goes; `data`: offset of its first byte of data, a multiple of 64."""

    name: bytes
    piece: Piece
    size: int
    offset: int
    data: int
    crc: int = 0

    @property
    def flags(self) -> int:
        return 0 if self.name.isascii() else _UTF8


def write_zip(file: BinaryIO, records: Sequence[tuple[str, Piece]], limits: Limits) -> None:
    """Write an archive from where the (seekable) file stands. Same records, same bytes.

    Raises:
        CheckpointError: A name is there twice or too long, or a piece gave other bytes than planned.
    """
    planned, directory = _plan(records)
    entries = sum(_CENTRAL.size + len(record.name) + len(_wide_central(record)) for record in planned)
    total = directory + entries + len(_end(len(planned), directory, entries))
    placed = [Placed(record.data, record.piece, record.name.decode()) for record in planned]

    def header(index: int, crc: _Crc) -> bytes:
        planned[index].crc = crc.value
        return _header(planned[index])

    base = file.tell()
    run_writes(file, placed, _Crc, limits, total=total, before=header)
    file.seek(base + directory)
    file.write(b"".join(map(_central, planned)) + _end(len(planned), directory, entries))


class _Crc:
    """CRC-32 of what it was given."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview) -> None:
        self.value = zlib_ng.crc32(data, self.value)


def _plan(records: Sequence[tuple[str, Piece]]) -> tuple[list[_Record], int]:
    planned = []
    seen: set[str] = set()
    at = 0
    for name, piece in records:
        encoded = name.encode()
        if name in seen or len(encoded) > 0xFF00:
            raise CheckpointError(f"the record name {name[:200]!r} is there twice or too long", name=name)
        seen.add(name)
        size = piece.nbytes
        least = at + _LOCAL.size + len(encoded) + len(_wide_local(size)) + 4
        data = least + -least % ALIGNMENT
        planned.append(_Record(encoded, piece, size, at, data))
        at = data + size
    return planned, at


def _wide_local(size: int) -> bytes:
    return struct.pack("<2H2Q", 1, 16, size, size) if size >= _U32 else b""


def _header(record: _Record) -> bytes:
    wide = _wide_local(record.size)
    pad = record.data - record.offset - _LOCAL.size - len(record.name) - len(wide) - 4
    extra = wide + struct.pack("<2H", _PADDING, pad) + b"Z" * pad
    size = 0xFFFFFFFF if wide else record.size
    version = 45 if wide else 20
    fixed = _LOCAL.pack(
        b"PK\3\4", version, record.flags, 0, 0, 0, record.crc, size, size, len(record.name), len(extra)
    )  # fmt: skip
    return fixed + record.name + extra


def _wide_central(record: _Record) -> bytes:
    if record.size < _U32 and record.offset < _U32:
        return b""
    fields = [value for value in (record.size, record.size, record.offset) if value >= _U32]
    return struct.pack(f"<2H{len(fields)}Q", 1, 8 * len(fields), *fields)


def _central(record: _Record) -> bytes:
    extra = _wide_central(record)
    size, offset = (0xFFFFFFFF if value >= _U32 else value for value in (record.size, record.offset))
    version = 45 if extra else 20
    fixed = _CENTRAL.pack(
        b"PK\1\2", version, version, record.flags, 0, 0, 0, record.crc, size, size,
        len(record.name), len(extra), 0, 0, 0, 0, offset,
    )  # fmt: skip
    return fixed + record.name + extra


def _end(count: int, directory: int, nbytes: int) -> bytes:
    wide = b""
    if count >= _U16 or directory >= _U32 or nbytes >= _U32:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, nbytes, directory)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, directory + nbytes, 1)
    entries = 0xFFFF if count >= _U16 else count
    nbytes, directory = (0xFFFFFFFF if value >= _U32 else value for value in (nbytes, directory))
    return wide + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, nbytes, directory, 0)
