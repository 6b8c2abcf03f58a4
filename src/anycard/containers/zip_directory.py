"""Read a zip's directory: record name -> checked byte range. Source: APPNOTE.TXT 4.3, 4.5.3."""

from __future__ import annotations

import struct
from typing import NamedTuple

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.limits import Limits

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


class Record(NamedTuple):
    """One record of an archive, its range proved inside the file."""

    name: str
    offset: int
    nbytes: int
    stored_nbytes: int
    crc: int | None
    compressed: bool


def read_directory(source: Source, limits: Limits) -> dict[str, Record]:
    """The records by name.

    Raises:
        FormatError: No end record (cut short), or any range that does not lie in the file.
    """
    count, size, start = _find_end(source)
    if count > limits.records or start + size > source.size or count * _ENTRY.size > size:
        raise FormatError(f"the zip directory claims {count:,} records in {size:,} bytes", offset=start)
    data = source.read(start, size)
    records: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        record, at = _entry(source, data, at, start)
        if record.name in records:
            raise FormatError(f"two records are called {record.name!r}", offset=start + at)
        records[record.name] = record
    return records


def _find_end(source: Source) -> tuple[int, int, int]:
    tail_size = min(source.size, 65_557)
    tail = source.read(source.size - tail_size, tail_size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise FormatError(
            "the file is cut short: a zip archive whose directory, at its end, is not there. "
            "Copy or download the file again.",
            offset=source.size,
        )
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        end64 = int.from_bytes(tail[at - 12 : at - 4], "little")
        if end64 + _END64.size > source.size:
            raise FormatError("the zip64 end record lies outside the file", offset=end64)
        fields = _END64.unpack(source.read(end64, _END64.size))
        if fields[0] != b"PK\x06\x06":
            raise FormatError("the zip64 end record is damaged", offset=end64)
        count, size, start = fields[7], fields[8], fields[9]
    return count, size, start


def _entry(source: Source, data: bytes, at: int, base: int) -> tuple[Record, int]:
    if at + _ENTRY.size > len(data):
        raise FormatError("the zip directory ends within a record", offset=base + at)
    fields = _ENTRY.unpack_from(data, at)
    if fields[0] != b"PK\x01\x02":
        raise FormatError("the zip directory is damaged", offset=base + at)
    flags, method, crc, stored, nbytes = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_size, extra_size, comment_size, header = fields[10], fields[11], fields[12], fields[16]
    end = at + _ENTRY.size + name_size + extra_size + comment_size
    if end > len(data):
        raise FormatError("the zip directory ends within a record", offset=base + at)
    raw = data[at + _ENTRY.size : at + _ENTRY.size + name_size]
    extra = data[at + _ENTRY.size + name_size : at + _ENTRY.size + name_size + extra_size]
    nbytes, stored, header = _zip64(extra, nbytes, stored, header)
    name = raw.decode("utf-8", "surrogateescape")
    if flags & 1 or method not in (0, 8):
        raise FormatError(f"record {name!r} is encrypted or compressed in an unknown way", offset=base + at)
    if method == 0 and stored != nbytes:
        raise FormatError(f"record {name!r} has two sizes, {stored:,} and {nbytes:,}", offset=base + at)
    offset = _data_offset(source, header, name, raw)
    if offset + stored > source.size:
        raise FormatError(
            f"the file is cut short: record {name!r} needs {stored:,} bytes, the file ends at {source.size:,}",
            offset=offset,
        )
    return Record(name, offset, nbytes, stored, crc or None, method == 8), end


def _zip64(extra: bytes, nbytes: int, stored: int, header: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = [int.from_bytes(extra[i : i + 8], "little") for i in range(at + 4, at + 4 + size - 7, 8)]
            full = [nbytes == 0xFFFFFFFF, stored == 0xFFFFFFFF, header == 0xFFFFFFFF]
            if len(values) < sum(full):
                raise FormatError("a zip64 field is too short")
            nbytes = values.pop(0) if full[0] else nbytes
            stored = values.pop(0) if full[1] else stored
            header = values.pop(0) if full[2] else header
        at += 4 + size
    return nbytes, stored, header


def _data_offset(source: Source, header: int, name: str, raw: bytes) -> int:
    if header + _LOCAL.size > source.size:
        raise FormatError(f"record {name!r} lies outside the file", offset=header)
    fields = _LOCAL.unpack(source.read(header, _LOCAL.size))
    if fields[0] != b"PK\x03\x04" or fields[9] != len(raw):
        raise FormatError(f"the header of record {name!r} is damaged", offset=header)
    return header + _LOCAL.size + int(fields[9]) + int(fields[10])
