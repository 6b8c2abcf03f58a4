"""What bytes and names look like to a scan: which may be pickles, or hold some."""

from __future__ import annotations

import re
from collections.abc import Iterator

from anycard.containers.streams import kind_of
from anycard.containers.zip_directory import read_directory
from anycard.disk.source import Source, WindowSource
from anycard.errors import FormatError
from anycard.formats import safetensors
from anycard.limits import Limits
from anycard.operations.archived_code import Context

NUMPY = b"\x93NUMPY"
NAMED = (".pkl", ".pickle", ".p", ".pt", ".pth", ".bin", ".ckpt", ".dill", ".joblib", ".distcp")
_MOST_ARCHIVES = 10_000
_DESCRIPTION = re.compile(rb"'descr'\s*:\s*(.{1,65536}?),\s*'fortran_order'", re.DOTALL)
_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def is_storage(name: str) -> bool:
    """A record of a tensor's bytes."""
    folder, _, last = name.rpartition("/")
    return folder.endswith("data") and (last.isdigit() or last.removesuffix(".storage").isdigit())


def may_hold(name: str, head: bytes) -> bool:
    """A member may be a pickle or hold some, by its first bytes or by its name."""
    told = may_be_pickle(head) or head.startswith((b"PK", NUMPY)) or kind_of(head)
    return bool(told) or name.lower().endswith(NAMED)


def told_by(name: str, head: bytes, context: Context) -> Context:
    """A member that neither its name nor PROTO tells to be a pickle may be anything."""
    tentative = not name.lower().endswith(NAMED) and not head.startswith(b"\x80")
    return context._replace(tentative=tentative)


def join(where: str, name: str) -> str:
    """A record's path within the files that hold it."""
    return f"{where}/{name}" if where else name


def zips_within(source: Source, limits: Limits) -> Iterator[Source]:
    """The archives that a file is made of, one after the other without a gap; none where that is not so."""
    data = source.read(0, min(source.size, limits.index_nbytes))
    parts: list[Source] = []
    start = end = 0
    for _ in range(_MOST_ARCHIVES):
        end = data.find(b"PK\x05\x06", end)
        if end < 0:
            break
        end += 22
        part = WindowSource(source, start, min(end, source.size) - start)
        try:
            read_directory(part, limits)
        except FormatError:
            continue
        parts.append(part)
        start = end
    if start == source.size:
        yield from parts


def may_be_pickle(head: bytes) -> bool:
    """It begins as pickles of protocols 2 to 5 do, or as those of protocol 0 and 1 that name something."""
    return head[:1] in (b"\x80", b"(", b"c", b"]", b"}")


def objects_of(source: Source) -> Source | None:
    """The pickle of a `.npy` file's objects, empty where it holds none; None where its header cannot be read."""
    wide = 4 if source.read(6, 1) >= b"\2" else 2
    start = 8 + wide + int.from_bytes(source.read(8, wide), "little")
    described = _DESCRIPTION.search(source.read(8 + wide, max(min(start, source.size) - 8 - wide, 0)))
    if described is None:
        return None
    return WindowSource(source, start, source.size - start if b"O" in described[1] else 0)


def is_legacy(data: bytes) -> bool:
    """A torch file from before 1.6."""
    return _MAGIC in data[:24]


def is_safetensors(source: Source, head: bytes, limits: Limits) -> bool:
    """Its header can be read; what a length of a few bytes looks like (a pickle's, zlib's or a zip's magic) is chance.

    Zeros and JSON are no stream of zlib, bz2 or lzma; gzip's third byte must be 8.
    """
    if head[8:9] != b"{" or head.startswith(b"\x1f\x8b\x08"):
        return False
    try:
        safetensors.read_index(source, limits)
    except FormatError:
        return False
    return True
