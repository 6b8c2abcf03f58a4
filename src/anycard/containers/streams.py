"""Compressed streams (gzip, zlib, bz2, xz, lzma, zstd), as bytes piece by piece, made when they are asked for."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from anycard.disk.source import Source
from anycard.errors import FormatError

_PIECE = 1 << 20
_MOST = 2 << 20
_RATIO = 32
_MEMORY = 96 << 20  # of the decoder; what xz -9 takes is below
_INSTALL = "`pip install zstandard` to read it as it is"
_WINDOW = 64 << 20  # of zstd's
_SIP = 1 << 10  # bytes of zstd that are decoded at once: each 4 may become 128 KiB
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


class _Zstd:
    """The zstandard package's decompressor, which knows no bound on what it gives, fed a little at a time."""

    eof = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._waiting = memoryview(b"")

    def decompress(self, data: bytes, most: int) -> bytes:
        self._waiting = self._waiting if self._waiting else memoryview(data)
        made = bytearray()
        while self._waiting and len(made) < most and not self.eof:
            made += self._inner.decompress(self._waiting[:_SIP])
            self._waiting = self._waiting[_SIP:]
            self.eof = self._inner.eof
        return bytes(made)

    @property
    def needs_input(self) -> bool:
        return not self._waiting


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        return _zstandard()
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW.bit_length() - 1})


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        message = f"the file is zstd-compressed: unpack it first, or {_INSTALL}"
        raise FormatError(message, offset=0) from None
    return _Zstd(zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj())


_KINDS: tuple[tuple[tuple[bytes, ...], str, Callable[[], Any]], ...] = (
    ((b"\x1f\x8b",), "gzip", lambda: _Zlib(31)),
    (_ZLIB, "zlib", lambda: _Zlib(15)),
    ((b"BZh",), "bz2", _bz2),
    ((b"\xfd7zXZ\0", b"\x5d\0\0"), "xz or lzma", _lzma),
    ((b"\x28\xb5\x2f\xfd",), "zstd", _zstd),
)


def kind_of(head: bytes) -> str:
    """What a stream is compressed by, or "" where it is not."""
    return next((kind for starts, kind, _ in _KINDS if head.startswith(starts)), "")


def lacking(kind: str) -> str:
    """What has to be installed to read streams of this kind, or ""."""
    if kind == "zstd" and all(importlib.util.find_spec(name) is None for name in ("compression", "zstandard")):
        return _INSTALL
    return ""


def inflated(source: Source, most: int, least: int = _MOST) -> Iterator[bytes]:
    """The stream's bytes; of one stream, what follows it is left.

    Args:
        most: What the stream may come to.
        least: What it may come to whatever its ratio: each byte of a pickle may become an object.

    Raises:
        FormatError: Damaged, cut short, or more than it may come to.
    """
    head = source.read(0, min(source.size, 8))
    decoder = next(make for starts, _, make in _KINDS if head.startswith(starts))()
    most = min(most, max(least, _RATIO * source.size))
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
