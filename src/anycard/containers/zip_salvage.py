"""Records of a zip whose directory is damaged, is missing or lies: by their own headers, wherever these stand.

For looking into what a file hides, not for reading it. Source: APPNOTE.TXT 4.3.7.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise

from anycard.disk.source import MemorySource, Source, WindowSource
from anycard.errors import FormatError
from anycard.limits import Limits

_LOCAL = struct.Struct("<4s5H3L2H")
_SIGNATURE = b"PK\x03\x04"
_STREAMED = 8  # flag: the sizes stand behind the data
_MOST_RECORDS = 100_000
_MOST_INFLATED = 64 << 20
_PLENTY = 1 << 20
_RATIO = 32
_PIECE = 16 << 10


def salvage(source: Source, limits: Limits) -> Iterator[tuple[str, Source]]:
    """Name and bytes of whatever looks like a record; the bytes run up to the next header where no size is told.

    Raises:
        FormatError: More headers, or bytes behind them, than a file of this size holds.
    """
    places = [*_headers(source, limits), source.size]
    left = 4 * source.size + _MOST_INFLATED
    for at, following in pairwise(places):
        found = _record(source, at, following)
        if found is None:
            continue
        name, packed, start, end = found
        held: Source = WindowSource(source, start, end - start)
        if packed:
            held = MemorySource(name, _inflated(held.read(0, min(held.size, limits.index_nbytes))))
            left -= held.size
        left -= end - start
        if left < 0:
            raise FormatError("the archive's records overlap, or inflate without end (a bomb?)", offset=at)
        yield name, held


def _headers(source: Source, limits: Limits) -> Iterator[int]:
    """Byte offsets of the signature."""
    count = 0
    step = limits.chunk_nbytes
    for base in range(0, source.size, step):
        block = source.read(base, min(step + len(_SIGNATURE) - 1, source.size - base))
        at = block.find(_SIGNATURE)
        while at >= 0:
            count += 1
            if count > _MOST_RECORDS:
                raise FormatError("the archive has more headers than anything real", offset=base + at)
            yield base + at
            at = block.find(_SIGNATURE, at + 1)


def _record(source: Source, at: int, following: int) -> tuple[str, bool, int, int] | None:
    """Name, whether it is deflated, and the range of its bytes."""
    if at + _LOCAL.size > source.size:
        return None
    fields = _LOCAL.unpack(source.read(at, _LOCAL.size))
    flags, method, stored, name_size, extra_size = fields[2], fields[3], fields[7], fields[9], fields[10]
    start = at + _LOCAL.size + name_size + extra_size
    if start > source.size:
        return None
    name = source.read(at + _LOCAL.size, name_size).decode("utf-8", "replace")
    told = start + stored
    end = told if stored and not flags & _STREAMED and told <= source.size else max(following, start)
    return name, method == 8, start, end


def _inflated(data: bytes) -> bytes:
    """As much as there is, and as weights inflate to, of a stream that may be damaged or go on for ever."""
    unpack = zlib.decompressobj(-15)
    made = bytearray()
    most = min(_MOST_INFLATED, max(_PLENTY, _RATIO * len(data)))
    with contextlib.suppress(zlib.error):
        for at in range(0, len(data), _PIECE):
            made += unpack.decompress(data[at : at + _PIECE], most - len(made))
            if unpack.eof or len(made) >= most:
                break
    return bytes(made)
