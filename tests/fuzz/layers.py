"""A file as what lies within it: members of archives, what is compressed, a header; each can be replaced."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

_MOST = 1 << 20  # of what is compressed, and of members
Rebuild = Callable[[bytes | None], bytes]


class Layer(NamedTuple):
    """Bytes within a file, and the file with others in their place (None: without them, where that can be)."""

    data: bytes
    rebuilt: Rebuild
    droppable: bool = False


def layers(data: bytes, depth: int = 3) -> list[Layer]:
    """The file itself, then everything inside it."""
    made = [Layer(data, lambda new: new or b"")]
    if depth:
        for outer in _inside(data):
            made += [_through(outer, inner) for inner in layers(outer.data, depth - 1)]
    return made


def _through(outer: Layer, inner: Layer) -> Layer:
    def rebuilt(new: bytes | None) -> bytes:
        whole = new is None and not inner.droppable
        return outer.rebuilt(None if whole else inner.rebuilt(new))

    return Layer(inner.data, rebuilt, outer.droppable or inner.droppable)


def _inside(data: bytes) -> list[Layer]:
    try:
        return list(_found(data))
    except Exception:  # noqa: BLE001 - the standard library's readers raise anything on damaged files
        return []


def _found(data: bytes) -> Iterator[Layer]:
    if data[8:9] == b"{":
        end = 8 + int.from_bytes(data[:8], "little")
        yield Layer(data[8:end], lambda new: len(new or b"").to_bytes(8, "little") + (new or b"") + data[end:])
    elif data[:2] == b"PK":
        yield from _zip(data)
    elif data[257:262] == b"ustar":
        yield from _tar(data)
    elif data[:2] == b"\x1f\x8b":
        yield _compressed(data, zlib.decompressobj(31), gzip.compress)
    elif data[:2] in (b"\x78\x9c", b"\x78\x5e", b"\x78\x01", b"\x78\xda"):
        yield _compressed(data, zlib.decompressobj(), zlib.compress)
    elif data[:3] == b"BZh":
        yield _compressed(data, bz2.BZ2Decompressor(), bz2.compress)
    elif data[:6] == b"\xfd7zXZ\0":
        yield _compressed(data, lzma.LZMADecompressor(), lzma.compress)


def _compressed(data: bytes, unpacker: object, pack: Callable[[bytes], bytes]) -> Layer:
    return Layer(unpacker.decompress(data, _MOST), lambda new: pack(new or b""))  # type: ignore[attr-defined]


def _zip(data: bytes) -> Iterator[Layer]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist()[:100] if info.file_size < _MOST]
        held = [(info, archive.read(info)) for info in infos]

    def rebuilt(which: int, new: bytes | None) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for index, (info, old) in enumerate(held):
                body = new if index == which else old
                if body is not None:
                    archive.writestr(info.filename, body, info.compress_type)
        return out.getvalue()

    for index, (_, body) in enumerate(held):
        yield Layer(body, lambda new, which=index: rebuilt(which, new), droppable=True)  # type: ignore[misc]


def _tar(data: bytes) -> Iterator[Layer]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(m, f.read(_MOST)) for m in archive.getmembers()[:50] if (f := archive.extractfile(m))]
    for member, _ in members:
        start = member.offset
        yield Layer(data[start : start + 512], lambda new, at=start: data[:at] + _header(new or b"") + data[at + 512 :])  # type: ignore[misc]

    def rebuilt(which: int, new: bytes | None) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for index, (member, old) in enumerate(members):
                body = new if index == which else old
                if body is not None:
                    info = tarfile.TarInfo(member.name)
                    info.size = len(body)
                    archive.addfile(info, io.BytesIO(body))
        return out.getvalue()

    for index, (_, body) in enumerate(members):
        yield Layer(body, lambda new, which=index: rebuilt(which, new), droppable=True)  # type: ignore[misc]


def _header(block: bytes) -> bytes:
    """A header of a tar with its checksum right again."""
    block = block[:512].ljust(512, b"\0")
    total = sum(block) - sum(block[148:156]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]
