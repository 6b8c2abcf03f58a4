"""Compressed streams (gzip, zlib, bz2, xz, lzma), as bytes piece by piece; nothing is made that no one asks for."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from anycard.disk.source import Source
from anycard.errors import FormatError

_PIECE = 1 << 20
_MOST = 2 << 20  # what a stream may come to, whatever its ratio: each byte of a pickle may become an object
_RATIO = 32
_MEMORY = 96 << 20  # of the decoder; what xz -9 takes is below
_ZLIB = tuple(bytes([0x78, second]) for second in (0x01, 0x5E, 0x9C, 0xDA))


def _bz2() -> Any:
    import bz2

    return bz2.BZ2Decompressor()


def _lzma() -> Any:
    import lzma

    return lzma.LZMADecompressor(memlimit=_MEMORY)


class _Zlib:
    """zlib's decompressor with the manners of the others."""

    def __init__(self, bits: int) -> None:
        self._inner = zlib.decompressobj(bits)
        self._tail = b""

    def decompress(self, data: bytes, most: int) -> bytes:
        made = self._inner.decompress(self._tail + data, most)
        self._tail = self._inner.unconsumed_tail
        return made

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._tail


_KINDS: tuple[tuple[tuple[bytes, ...], str, Callable[[], Any]], ...] = (
    ((b"\x1f\x8b",), "gzip", lambda: _Zlib(31)),
    (_ZLIB, "zlib", lambda: _Zlib(15)),
    ((b"BZh",), "bz2", _bz2),
    ((b"\xfd7zXZ\0", b"\x5d\0\0"), "xz or lzma", _lzma),
)


def kind_of(head: bytes) -> str:
    """What a stream is compressed by, or "" where it is not."""
    return next((kind for starts, kind, _ in _KINDS if head.startswith(starts)), "")


def inflated(source: Source, most: int) -> Iterator[bytes]:
    """The stream's bytes; of one stream, what follows it is left.

    Raises:
        FormatError: Damaged, cut short, or more than `most` or than real pickles come to.
    """
    head = source.read(0, min(source.size, 8))
    decoder = next(make for starts, _, make in _KINDS if head.startswith(starts))()
    most = min(most, max(_MOST, _RATIO * source.size))
    done = 0
    at = 0
    while not decoder.eof:
        fed = source.read(at, min(_PIECE, source.size - at)) if decoder.needs_input else b""
        if not fed and decoder.needs_input:
            raise FormatError(f"the file is cut short: its {kind_of(head)} stream does not end", offset=source.size)
        piece = _decoded(decoder, fed, kind_of(head), at)
        at += len(fed)
        done += len(piece)
        if done > most:
            raise FormatError(f"the {kind_of(head)} stream inflates to more than {most:,} bytes (a bomb?)", offset=at)
        yield piece


def _decoded(decoder: Any, fed: bytes, kind: str, at: int) -> bytes:
    try:
        piece: bytes = decoder.decompress(fed, _PIECE)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - zlib.error, OSError, LZMAError, EOFError: each module has its own
        raise FormatError(f"the {kind} stream is damaged: {str(error)[:200]}", offset=at) from None
    return piece
