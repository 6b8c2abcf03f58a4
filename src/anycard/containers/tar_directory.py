"""Read a tar's headers: member name -> checked byte range. Source: POSIX.1-2001 pax, GNU tar manual."""

from __future__ import annotations

from collections.abc import Iterator

from anycard.containers.zip_directory import Record
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.limits import Limits

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_MOST_MEMBERS = 50_000  # a header's checksum takes time, and small ones are cheap to make
_MOST_NAME = 1 << 20  # of what a pax or GNU header says of the next member


def is_tar(head: bytes) -> bool:
    """The bytes, 512 at least, begin a tar of the kinds that are written today."""
    return head[257:262] == b"ustar"


def read_tar(source: Source, limits: Limits) -> dict[str, Record]:
    """The regular members by name; of two with one name the later one, as tar has it.

    Raises:
        FormatError: A header is damaged, or a member does not lie in the file.
    """
    return {member.name: member for member in members(source, limits)}


def members(source: Source, limits: Limits) -> Iterator[Record]:
    """The regular members in their order; FormatError as `read_tar`, once those before are given."""
    at = 0
    count = 0
    said: dict[str, str] = {}
    while at + _BLOCK <= source.size:
        header = source.read(at, _BLOCK)
        if not any(header):
            break
        count += 1
        if count > min(limits.records, _MOST_MEMBERS):
            raise FormatError(f"the tar has more than {count - 1:,} members", offset=at)
        _check(header, at)
        kind, size, data = header[156:157], _number(header[124:136], at), at + _BLOCK
        if kind not in (b"x", b"g", b"L", b"K") and "size" in said:
            size = _pax_size(said["size"], at)
        if data + size > source.size:
            raise FormatError(f"the file is cut short: a member needs {size:,} bytes from byte {data:,}", offset=at)
        if kind in (b"x", b"L"):
            said.update(_said(kind, source.read(data, _bounded(size, at)), at))
        elif kind not in (b"g", b"K"):
            name = (said.get("path") or _name(header)).removeprefix("./")
            if kind == b"S" or any(key.startswith("GNU.sparse.") for key in said):
                raise FormatError(f"member {name[:200]!r} is sparse, which is not read", offset=at)
            if kind in _REGULAR and name:
                yield Record(name, data, size, size, None, False)
            said = {}
        at = data + size + -size % _BLOCK


def _bounded(size: int, at: int) -> int:
    if size > _MOST_NAME:
        raise FormatError(f"a tar header of {size:,} bytes", offset=at)
    return size


def _check(header: bytes, at: int) -> None:
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if _number(header[148:156], at) != total:
        raise FormatError("a tar header is damaged: its checksum does not match", offset=at)


def _number(field: bytes, at: int) -> int:
    """Octal text, or base 256 where its first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b"\0 ") or b"0"
    if text.strip(b"01234567"):
        raise FormatError("a tar header has no number where one is needed", offset=at)
    return int(text, 8)


def _pax_size(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise FormatError("a pax header has no size", offset=at)
    return int(text)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _said(kind: bytes, data: bytes, at: int) -> dict[str, str]:
    """What a header says of the next member: GNU's long name, or pax's records `length key=value`."""
    if kind == b"L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    made: dict[str, str] = {}
    place = 0
    while place < len(data):
        length, blank, _ = data[place : place + 20].partition(b" ")
        size = int(length) if blank and length.isdigit() else 0
        record = data[place : place + size]
        if size <= len(length) + 1 or not record.endswith(b"\n"):
            raise FormatError("a pax header is damaged", offset=at)
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        made[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        place += size
    return made
