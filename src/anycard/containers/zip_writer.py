"""Write a zip that torch reads and maps: stored, aligned to 64, no times. Source: APPNOTE.TXT 4.3, 4.5.3."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from zlib_ng import zlib_ng

from anycard.disk.pieces import Piece
from anycard.limits import Limits

_ALIGN = 64
_MOST = 0xFFFFFFFF


class _Planned(NamedTuple):
    name: bytes
    piece: Piece
    header: int
    extra: bytes


def write_zip(file: BinaryIO, records: Sequence[tuple[str, Piece]], limits: Limits) -> None:
    """Write the records from the file's start. The same records give the same bytes.

    Offsets are planned first; a header is written behind its data, once the CRC is known.
    """
    plan, end = _plan(records)
    crcs = []
    for planned in plan:
        start = planned.header + 30 + len(planned.name) + len(planned.extra)
        file.seek(start)
        crc = 0
        for chunk in planned.piece.chunks(limits.chunk_nbytes):
            crc = zlib_ng.crc32(chunk, crc)
            file.write(chunk)
        crcs.append(crc)
        file.seek(planned.header)
        file.write(_local(planned, crc))
    file.seek(end)
    directory = b"".join(_entry(planned, crc) for planned, crc in zip(plan, crcs, strict=True))
    file.write(directory)
    file.write(_end(len(plan), len(directory), end))


def _plan(records: Sequence[tuple[str, Piece]]) -> tuple[list[_Planned], int]:
    plan = []
    at = 0
    for text, piece in records:
        name = text.encode("utf-8")
        wide = _zip64_local(piece.nbytes)
        # torch pads with an extra field "FB"; its four bytes of head must fit, too.
        pad = -(at + 30 + len(name) + len(wide) + 4) % _ALIGN
        extra = wide + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        plan.append(_Planned(name, piece, at, extra))
        at += 30 + len(name) + len(extra) + piece.nbytes
    return plan, at


def _zip64_local(nbytes: int) -> bytes:
    return struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= _MOST else b""


def _local(planned: _Planned, crc: int) -> bytes:
    size = min(planned.piece.nbytes, _MOST)
    return (
        struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 45 if size == _MOST else 20, 0x0800, 0, 0, 0x21, crc, size, size,
            len(planned.name), len(planned.extra),
        )
        + planned.name
        + planned.extra
    )  # fmt: skip


def _entry(planned: _Planned, crc: int) -> bytes:
    nbytes, header = planned.piece.nbytes, planned.header
    values = [nbytes, nbytes] if nbytes >= _MOST else []
    values += [header] if header >= _MOST else []
    extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    size = min(nbytes, _MOST)
    version = 45 if values else 20
    return (
        struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", version, version, 0x0800, 0, 0, 0x21, crc, size, size,
            len(planned.name), len(extra), 0, 0, 0, 0, min(header, _MOST),
        )
        + planned.name
        + extra
    )  # fmt: skip


def _end(count: int, size: int, start: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or start >= _MOST or size >= _MOST:
        wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        wide += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size, 1)
    short = min(count, 0xFFFF)
    return wide + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, min(size, _MOST), min(start, _MOST), 0)
