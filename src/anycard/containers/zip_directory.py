"""Read a zip's directory: record name -> checked byte range. Source: APPNOTE.TXT 4.3, 4.5.3.

Where archives are odd, this takes what torch's reader (miniz) takes, which is what "a torch zip" means.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat
from operator import add, le
from typing import NamedTuple

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.limits import Limits

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
# Of both only what is looked at; the rest is passed over.
_ENTRY = struct.Struct("<4s4x2H4x3L3H8xL")
_LOCAL = struct.Struct("<4s22x2H")
_MARK = b"PK\x01\x02"
_FIXED = struct.Struct("<4x2H4x3LHL8xL")  # an entry without the mark; its extra field and comment as one number
_FULL = 0xFFFFFFFF
# How far from the end miniz looks for the end record: in blocks of 4,096 bytes that overlap by 3, until
# 64 KiB and a record are behind it. What lies after the record is a comment, or was appended.
_TAIL = 4_096 + 16 * 4_093
_MOST_INFLATED = 64 << 20  # what compressed records may come to, whatever their ratio
_RATIO = 100
_DEFLATE = 1_032  # deflate's own bound


class Record(NamedTuple):
    """One record of an archive, its range proved inside the file."""

    name: str
    offset: int
    nbytes: int
    stored_nbytes: int
    crc: int | None
    compressed: bool


_RECORD = partial(tuple.__new__, Record)  # an archive has many: less than a call of the class takes


def read_directory(source: Source, limits: Limits) -> dict[str, Record]:
    """The records by name.

    Raises:
        FormatError: No end record (cut short), any range that does not lie in the file or that another
            record uses too, or records that inflate to more than weights do.
    """
    count, size, start = _find_end(source)
    if count > limits.records or start + size > source.size or count * _ENTRY.size > size:
        raise FormatError(f"the zip directory claims {count:,} records in {size:,} bytes", offset=start)
    if size > limits.index_nbytes:
        raise FormatError(f"the zip directory claims {size:,} bytes", offset=start)
    data = source.read(start, size) if count else b""
    return _usual(source, data, count, start) or _one_by_one(source, data, count, start)


def _usual(source: Source, data: bytes, count: int, start: int) -> dict[str, Record] | None:
    """The records of a directory that has nothing but stored ones in the order of the file, a column at a time.

    None for any other, be it good or bad.
    """
    if not count or data.count(_MARK) != count or not data.startswith(_MARK):
        return None
    entries = data.split(_MARK)[1:]
    try:
        rows = _FIXED.iter_unpack(b"".join([entry[: _FIXED.size] for entry in entries]))
        flags, methods, crcs, stored, sizes, name_sizes, more, headers = zip(*rows, strict=True)
    except (struct.error, ValueError):
        return None
    names = [entry[_FIXED.size :] for entry in entries]
    spare = any(flag & 0x2061 for flag in set(flags)) or any(set(methods)) or any(set(more))
    if spare or stored != sizes or max(stored) == _FULL or max(headers) == _FULL:
        return None
    if list(map(len, names)) != list(name_sizes) or len(set(names)) < count:
        return None
    offsets = _data_offsets(source, headers, names)
    ends = list(map(add, offsets or (), stored))
    if offsets is None or not all(map(le, ends, (*headers[1:], start))):
        return None
    text = [name.decode("utf-8", "surrogateescape") for name in names]
    made = map(_RECORD, zip(text, offsets, sizes, stored, crcs, repeat(False), strict=False))
    records = dict(zip(text, made, strict=True))
    return records if all(crcs) else _without_crc(records)


def _data_offsets(source: Source, headers: Sequence[int], names: Sequence[bytes]) -> list[int] | None:
    """Where each record's data begins; None where a local header is not what the directory says."""
    lengths = [_LOCAL.size + len(name) for name in names]
    if max(map(add, headers, lengths)) > source.size:
        return None
    locals_ = source.read_each(headers, lengths)
    fixed = b"".join([held[: _LOCAL.size] for held in locals_])
    marks, name_sizes, extra_sizes = zip(*_LOCAL.iter_unpack(fixed), strict=True)
    if {*marks} != {b"PK\x03\x04"} or list(name_sizes) != list(map(len, names)):
        return None
    if [held[_LOCAL.size :] for held in locals_] != names:
        return None
    return list(map(add, map(add, headers, lengths), extra_sizes))


def _one_by_one(source: Source, data: bytes, count: int, start: int) -> dict[str, Record]:
    """The records of any directory, each looked at by itself."""
    records: dict[str, Record] = {}
    ranges = [(start, start + len(data), "the directory")]
    at = 0
    for _ in range(count):
        record, header, at = _entry(source, data, at, start)
        name, offset, _, stored, _, _ = record
        if name in records:
            raise FormatError(f"two records are called {name!r}", offset=start + at)
        records[name] = record
        ranges.append((header, offset + stored, name))
    _refuse_overlap(ranges)
    _refuse_bomb(records.values(), start)
    return _without_crc(records)


def _refuse_overlap(ranges: list[tuple[int, int, str]]) -> None:
    """Records that share bytes make a small file inflate without end, or are a lie."""
    ranges.sort()
    last, owner = 0, ""
    for start, end, name in ranges:
        if start < last:
            raise FormatError(f"record {name!r} overlaps {owner!r}", offset=start)
        last, owner = end, name


def _refuse_bomb(records: Iterable[Record], start: int) -> None:
    packed = [r for r in records if r.compressed]
    inflated = sum(r.nbytes for r in packed)
    if inflated > _MOST_INFLATED and inflated > _RATIO * sum(r.stored_nbytes for r in packed):
        reason = f"inflate to {inflated:,} bytes, more than weights do (a bomb?)"
        raise FormatError(f"the archive's records {reason}", offset=start)


def _without_crc(records: dict[str, Record]) -> dict[str, Record]:
    """torch writes CRC 0 for all records where CRCs are off, for all storages in a file that is filled later.

    A single 0 beside others is a CRC. Source: torch.serialization.skip_data.
    """
    if all(record.crc or not record.nbytes for record in records.values()):
        return records
    filled = {name for name, record in records.items() if record.nbytes}
    storages = {name for name in filled if name.rpartition("/")[0].rpartition("/")[2] == "data"}
    for group in (filled, storages):
        if group and not any(records[name].crc for name in group):
            return {name: r._replace(crc=None) if name in group else r for name, r in records.items()}
    return records


def _find_end(source: Source) -> tuple[int, int, int]:
    tail_size = min(source.size, _TAIL)
    tail = source.read(source.size - tail_size, tail_size)
    at = tail.rfind(b"PK\x05\x06", 0, max(len(tail) - _END.size + 4, 0))
    if at < 0:
        raise FormatError(
            "the file is cut short: a zip archive whose directory, at its end, is not there. "
            "Copy or download the file again.",
            offset=source.size,
        )
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    place = source.size - tail_size + at
    if place >= 20 + _END64.size:
        locator = source.read(place - 20, 20)
        if locator.startswith(b"PK\x06\x07"):
            return _find_end64(source, int.from_bytes(locator[8:16], "little")) or (count, size, start)
    return count, size, start


def _find_end64(source: Source, at: int) -> tuple[int, int, int] | None:
    """The zip64 end record, which wins over the classic one; None where there is none, as miniz has it."""
    if at + _END64.size > source.size:
        raise FormatError("the zip64 end record lies outside the file", offset=at)
    fields = _END64.unpack(source.read(at, _END64.size))
    return (fields[7], fields[8], fields[9]) if fields[0] == b"PK\x06\x06" else None


def _entry(source: Source, data: bytes, at: int, base: int) -> tuple[Record, int, int]:
    """A record, where its local header lies, and where the next entry begins."""
    if at + _ENTRY.size > len(data):
        raise FormatError("the zip directory ends within a record", offset=base + at)
    mark, flags, method, crc, stored, nbytes, name_size, extra_size, comment_size, header = _ENTRY.unpack_from(data, at)
    if mark != _MARK:
        raise FormatError("the zip directory is damaged", offset=base + at)
    name_end = at + _ENTRY.size + name_size
    end = name_end + extra_size + comment_size
    if end > len(data):
        raise FormatError("the zip directory ends within a record", offset=base + at)
    raw = data[at + _ENTRY.size : name_end]
    if nbytes == _FULL or stored == _FULL or header == _FULL:
        nbytes, stored, header = _zip64(data[name_end : name_end + extra_size], nbytes, stored, header, base + at)
    name = raw.decode("utf-8", "surrogateescape")
    if flags & 0x2061 or method or stored != nbytes:
        _refuse_method(name, flags, method, stored, nbytes, base + at)
    offset = _data_offset(source, header, name, raw)
    if offset + stored > source.size:
        raise FormatError(
            f"the file is cut short: record {name!r} needs {stored:,} bytes, the file ends at {source.size:,}",
            offset=offset,
        )
    return _RECORD((name, offset, nbytes, stored, crc, method == 8)), header, end


def _refuse_method(name: str, flags: int, method: int, stored: int, nbytes: int, place: int) -> None:
    """Refuse what is neither stored nor deflated, and sizes that cannot be."""
    if flags & 0x2061 or method not in (0, 8):  # encrypted (three ways), patched
        raise FormatError(f"record {name!r} is encrypted or compressed in an unknown way", offset=place)
    if method == 0:
        raise FormatError(f"record {name!r} has two sizes, {stored:,} and {nbytes:,}", offset=place)
    if nbytes > _DEFLATE * (stored + 1):
        raise FormatError(f"record {name!r} claims more than deflate can hold", offset=place)


def _zip64(extra: bytes, nbytes: int, stored: int, header: int, place: int) -> tuple[int, int, int]:
    """Sizes and offset where 32 bits do not hold them: the field has those that are full, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            held = extra[at + 4 : at + 4 + size]
            values = [int.from_bytes(held[i : i + 8], "little") for i in range(0, len(held) - 7, 8)]
            full = [nbytes == _FULL, stored == _FULL, header == _FULL]
            if len(values) < sum(full):
                raise FormatError("a zip64 field is too short", offset=place)
            nbytes = values.pop(0) if full[0] else nbytes
            stored = values.pop(0) if full[1] else stored
            header = values.pop(0) if full[2] else header
            break
        at += 4 + size
    return nbytes, stored, header


def _data_offset(source: Source, header: int, name: str, raw: bytes) -> int:
    """Where the data begins. Sizes and CRC are the directory's: torch leaves them out of the local header."""
    nbytes = _LOCAL.size + len(raw)
    if header + nbytes > source.size:
        raise FormatError(f"record {name!r} lies outside the file", offset=header)
    data = source.read(header, nbytes)
    mark, name_size, extra_size = _LOCAL.unpack_from(data)
    if mark != b"PK\x03\x04":
        raise FormatError(f"the header of record {name!r} is damaged", offset=header)
    if name_size != len(raw) or not data.endswith(raw):
        raise FormatError(f"record {name!r} has another name in its own header", offset=header)
    return header + nbytes + int(extra_size)
