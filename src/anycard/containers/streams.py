"""Compressed streams (gzip, zlib, bz2, xz, lzma, zstd), as bytes piece by piece, made when they are asked for."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from anycard.disk.source import Source
from anycard.errors import FormatError

_PIECE = 1 << 20
_FED = 64 << 10  # of what is packed, at once: behind a short stream, the rest is read again
_FIRST = 8 << 10  # what Python's modules look at first, behind a stream, for another
_MOST = 2 << 20
_MOST_STREAMS = 1_000_000
_RATIO = 32
_MEMORY = 96 << 20  # of the decoder; what xz -9 takes is below
_INSTALL = "`pip install zstandard` to read it as it is"
_WINDOW = 64 << 20  # of zstd's
_SIP = 1 << 10  # bytes of zstd that are decoded at once: each 4 may become 128 KiB
_ZLIB = tuple(bytes([0x78, second]) for second in (0x01, 0x5E, 0x9C, 0xDA))
_LZMA = b"\x5d\0"


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

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Zstd:
    """The zstandard package's decompressor, which knows no bound on what it gives, fed a little at a time."""

    eof = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._waiting = memoryview(b"")

    def decompress(self, data: bytes, most: int) -> bytes:
        self._waiting = self._waiting if self._waiting else memoryview(data)
        made = bytearray()
        sip = min(most, _SIP)
        while self._waiting and len(made) < most and not self.eof:
            made += self._inner.decompress(self._waiting[:sip])
            self._waiting = self._waiting[sip:]
            self.eof = self._inner.eof
        return bytes(made)

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data) + bytes(self._waiting)


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        return _zstandard()
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW.bit_length() - 1})


class _DamagedError(FormatError):
    """What was taken for a stream decodes to nothing."""


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        message = f"the file is zstd-compressed: unpack it first, or {_INSTALL}"
        raise FormatError(message, offset=0) from None
    return _Zstd(zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj())


_KINDS: tuple[tuple[tuple[bytes, ...], str, Callable[[], Any]], ...] = (
    ((b"\x1f\x8b\x08",), "gzip", lambda: _Zlib(31)),
    (_ZLIB, "zlib", lambda: _Zlib(15)),
    (tuple(b"BZh%d" % level for level in range(1, 10)), "bz2", _bz2),
    ((b"\xfd7zXZ\0", _LZMA), "xz or lzma", _lzma),
    ((b"\x28\xb5\x2f\xfd",), "zstd", _zstd),
)


def kind_of(head: bytes) -> str:
    """What a stream is compressed by, or "" where it is not."""
    return next((kind for starts, kind, _ in _KINDS if head.startswith(starts)), "")


def by_chance(head: bytes) -> bool:
    """So few bytes tell the kind of stream that the beginning of any bytes may look like it."""
    return head.startswith((*_ZLIB, _LZMA))


def begun(source: Source) -> bytes | None:
    """What a stream gives up to where it breaks, byte by byte; None where it goes on for longer than chance does."""
    head = source.read(0, min(source.size, _FIRST))
    decoder = next(make for starts, _, make in _KINDS if head.startswith(starts))()
    made = bytearray()
    for at in range(len(head)):
        try:
            made += _decoded(decoder, head[at : at + 1], _PIECE, "", at)
        except FormatError as error:
            return bytes(made) if isinstance(error, _DamagedError) else None
        if decoder.eof or not decoder.needs_input:
            return None
    return bytes(made) if len(head) == source.size else None


def lacking(kind: str) -> str:
    """What has to be installed to read streams of this kind, or ""."""
    if kind == "zstd" and all(importlib.util.find_spec(name) is None for name in ("compression", "zstandard")):
        return _INSTALL
    return ""


def inflated(source: Source, most: int, least: int = _MOST, *, whole: bool = False) -> Iterator[bytes]:
    """The bytes of the streams that a source is made of, as Python's gzip, bz2 and lzma modules read them.

    Zeros behind a stream are padding. Anything else that is no stream is an error behind gzip's, and is left behind
    the others. Of zlib there is one stream.

    Args:
        most: What the streams may come to.
        least: What they may come to whatever their ratio: each byte of a pickle may become an object.
        whole: Nothing may be left behind a stream of zlib's, either.

    Raises:
        FormatError: Damaged, cut short, or more than it may come to.
    """
    head = source.read(0, min(source.size, 8))
    kind, make = next((kind, make) for starts, kind, make in _KINDS if head.startswith(starts))
    most = min(most, max(least, _RATIO * source.size))
    at = done = 0
    for count in range(_MOST_STREAMS):
        decoder = make()
        may_be_none = count > 0 and kind != "gzip"
        while not decoder.eof:
            size = min(_FIRST if may_be_none else _FED, source.size - at)
            fed = source.read(at, size) if decoder.needs_input else b""
            if not fed and decoder.needs_input:
                raise FormatError(f"the file is cut short: its {kind} stream does not end", offset=source.size)
            try:
                piece = _decoded(decoder, fed, 1 if may_be_none else _PIECE, kind, at)
            except _DamagedError:
                if may_be_none:
                    return
                raise
            may_be_none = False
            at += len(fed)
            done += len(piece)
            if done > most:
                raise FormatError(f"the {kind} stream inflates to more than {most:,} bytes (a bomb?)", offset=at)
            yield piece
        at = _next(source, kind, at - len(decoder.unused_data), whole)
        if at == source.size:
            return
    raise FormatError(f"more than {_MOST_STREAMS:,} {kind} streams one after the other", offset=at)


def _decoded(decoder: Any, fed: bytes, most: int, kind: str, at: int) -> bytes:
    try:
        piece: bytes = decoder.decompress(fed, most)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - zlib.error, OSError, LZMAError, EOFError: each module has its own
        told = str(error)[:200]
        if "memory" in told.lower():
            raise FormatError(f"the {kind} stream needs too much memory: {told}", offset=at) from None
        raise _DamagedError(f"the {kind} stream is damaged: {told}", offset=at) from None
    return piece


def _next(source: Source, kind: str, at: int, whole: bool) -> int:
    """Where another stream is to be looked for behind one; the end, where there is nothing."""
    if kind == "zlib":
        if whole and at < source.size:
            raise FormatError(f"{source.size - at:,} bytes behind the zlib stream, from byte {at:,}", offset=at)
        return source.size
    filled = _behind_zeros(source, at)
    if kind != "gzip":
        return source.size if filled == source.size else at
    if filled < source.size and source.read(filled, min(2, source.size - filled)) != b"\x1f\x8b":
        raise FormatError(f"what stands behind the gzip stream, from byte {filled:,}, is no gzip stream", offset=filled)
    return filled


def _behind_zeros(source: Source, at: int) -> int:
    """The place of the first byte that is not 0."""
    while at < source.size:
        piece = source.read(at, min(_FED, source.size - at))
        rest = piece.lstrip(b"\0")
        if rest:
            return at + len(piece) - len(rest)
        at += len(piece)
    return at
