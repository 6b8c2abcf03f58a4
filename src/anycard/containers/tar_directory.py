"""Read a tar's headers: member name -> checked byte range. Source: POSIX.1-2001 pax, GNU tar manual.

Where tars are odd, this takes what Python's tarfile takes, as torch does, or refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator

from anycard.containers.zip_directory import Record
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.limits import Limits

_BLOCK = 512
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes; all others are files
_PAX = (b"x", b"X")
_MOST_MEMBERS = 50_000  # a header's checksum takes time, and small ones are cheap to make
_MOST_NAME = 1 << 20  # of what a pax or GNU header says of the next member
_OF_ONE = ("path", "linkpath", "size")  # what only one member can have


def is_tar(head: bytes) -> bool:
    """The bytes, 512 at least, begin a tar; those from before POSIX are told by the checksum alone."""
    if head[257:262] == b"ustar" or len(head) < _BLOCK:
        return head[257:262] == b"ustar"
    try:
        _check(head[:_BLOCK], 0)
    except FormatError:
        return False
    return True


def read_tar(source: Source, limits: Limits) -> dict[str, Record]:
    """The regular members by name; of two with one name the later one, as tar has it.

    Raises:
        FormatError: A header is damaged, or a member does not lie in the file.
    """
    return {member.name: member for member in members(source, limits)}


def members(source: Source, limits: Limits) -> Iterator[Record]:
    """The regular members in their order; FormatError as `read_tar`, once those before are given."""
    return (member for member, is_file in entries(source, limits) if is_file)


def entries(source: Source, limits: Limits) -> Iterator[tuple[Record, bool]]:
    """All members that have a name, and whether they are files; FormatError as `members`."""
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
        if kind in (*_PAX, b"g", b"L", b"K"):
            _say(said, kind, _extended(source, data, size, at), at)
        else:
            name = (said.get("path") or _name(header)).removeprefix("./")
            if kind == b"S" or any(key.startswith("GNU.sparse.") for key in said):
                raise FormatError(f"member {name[:200]!r} is sparse, which is not read", offset=at)
            is_file = kind not in _WITHOUT_BYTES and not (kind == b"\0" and _text(header[:100]).endswith("/"))
            size = _pax_size(said["size"], at) if "size" in said else size
            size = size if is_file else 0
            _refuse_beyond(source, data, size, at)
            if name:
                yield Record(name, data, size, size, None, False), is_file
            said = {}
        at = data + size + -size % _BLOCK


def _refuse_beyond(source: Source, data: int, size: int, at: int) -> None:
    if data + size > source.size:
        raise FormatError(f"the file is cut short: a member needs {size:,} bytes from byte {data:,}", offset=at)


def _extended(source: Source, data: int, size: int, at: int) -> bytes:
    """What a header says of members; Python's tarfile reads on to the end of the block."""
    if size > _MOST_NAME:
        raise FormatError(f"a tar header of {size:,} bytes", offset=at)
    _refuse_beyond(source, data, size, at)
    whole = source.read(data, min(size + -size % _BLOCK, source.size - data))
    if any(whole[size:]):
        raise FormatError("a tar header that says more than its size tells", offset=at)
    return whole[:size]


def _say(said: dict[str, str], kind: bytes, data: bytes, at: int) -> None:
    """Add what a header says; nothing may be said twice, as readers take the one or the other."""
    if kind == b"K":
        return
    made = _said(kind, data, at)
    if kind == b"g":
        if any(key in _OF_ONE or key.startswith("GNU.sparse.") for key in made):
            raise FormatError("a tar header gives one name or size to all members", offset=at)
        return
    if not made.keys().isdisjoint(said):
        raise FormatError("two tar headers say the same of one member", offset=at)
    said.update(made)


def _check(header: bytes, at: int) -> None:
    """The sum of the bytes, which some took for signed ones."""
    summed = header[:148] + b" " * 8 + header[156:]
    over = sum(summed) - _number(header[148:156], at)
    if over and over != 256 * sum(byte > 127 for byte in summed):
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
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _said(kind: bytes, data: bytes, at: int) -> dict[str, str]:
    """What a header says of the next member: GNU's long name, or pax's records `length key=value`."""
    if kind == b"L":
        return {"path": _text(data)}
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
