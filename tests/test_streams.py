"""Compressed files of several streams, and what stands behind them, as Python's own modules take them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

import anycard
from anycard.containers import streams
from anycard.containers.streams import inflated
from anycard.disk.source import MemorySource
from anycard.errors import FormatError
from helpers import assert_same

MODULES: dict[str, Any] = {"gz": gzip, "bz2": bz2, "xz": lzma}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    **{name: module.compress for name, module in MODULES.items()}, "zst": zstandard.compress
}  # fmt: skip


def theirs(module: Any, data: bytes) -> bytes | None:
    """What the module reads; None where it refuses."""
    try:
        found: bytes = module.open(io.BytesIO(data)).read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return None
    return found


def ours(data: bytes) -> bytes | None:
    try:
        return b"".join(inflated(MemorySource("test", data), 1 << 30))
    except FormatError:
        return None


def behind(pack: Callable[[bytes], bytes], second: bytes) -> Iterator[tuple[str, bytes]]:
    """Bytes that may stand behind a stream."""
    other = pack(second)
    yield from {
        "nothing": b"", "another": other, "three": other * 3, "empty ones": pack(b"") * 40 + other + pack(b""),
        "zeros": bytes(4), "one zero": b"\0", "many zeros": bytes(70_000), "zeros before another": bytes(8) + other,
        "words": b"words that are no stream at all", "one byte": b"j", "a head": other[:3], "cut": other[:-3],
        "damaged first": other[:12] + b"\xff\xff\xff\xff" + other[16:],
        "damaged last": other[:-9] + b"\xff\xff" + other[-7:],
        "damaged late": other[: len(other) // 2] + b"\xff\xff\xff" + other[len(other) // 2 + 3 :],
        "lzma": lzma.compress(second, lzma.FORMAT_ALONE), "another kind": bz2.compress(b"a") + gzip.compress(b"b"),
    }.items()  # fmt: skip


@pytest.mark.parametrize("suffix", MODULES)
@pytest.mark.parametrize("size", [5, 100_000, 1_000_000])
def test_streams_are_read_as_python_reads_them(suffix: str, size: int) -> None:
    """The same bytes, or an error; but for zeros behind xz, which are its padding and which Python has no patience for.

    Python forgives a second stream that breaks in its first 8 KiB even where it has given something; we refuse it.
    """
    module, first = MODULES[suffix], b"first" * 2_000
    for name, more in behind(module.compress, random.Random(1).randbytes(size)):
        data = module.compress(first) + more
        want, found = theirs(module, data), ours(data)
        if suffix == "xz" and name in ("zeros", "one zero", "many zeros"):
            assert (want, found) == (None, first), name
        elif name.startswith("damaged") and found is None:
            assert want in (None, first), name
        else:
            assert found == want, name


def test_zlib_is_one_stream() -> None:
    """As `zlib.decompress` has it."""
    data = zlib.compress(b"first") + zlib.compress(b"second")
    assert ours(data) == zlib.decompress(data) == b"first"


def test_frames_of_zstd_are_all_read() -> None:
    data = zstandard.compress(b"first") + zstandard.compress(b"second" * 9_000)
    assert ours(data) == b"first" + b"second" * 9_000
    assert ours(data + b"words") == b"first" + b"second" * 9_000
    assert ours(data[:-2]) is None


def test_streams_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST_STREAMS", 100)
    assert ours(gzip.compress(b"") * 99) == b""
    assert ours(gzip.compress(b"") * 101) is None


def test_the_bound_is_on_all_streams_together() -> None:
    """Each alone inflates to less than pickles may."""
    data = gzip.compress(bytes(1 << 20)) * 40
    with pytest.raises(FormatError, match="bomb"):
        b"".join(inflated(MemorySource("test", data), 1 << 30))


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("inner", ["zip", "pickle"])
def test_checkpoints_in_several_streams(tmp_path: Path, suffix: str, inner: str) -> None:
    """Cut anywhere, packed piece by piece."""
    want, file = {"w": torch.arange(5_000.0), "b": torch.ones(3)}, io.BytesIO()
    torch.save(want, file)
    data = file.getvalue() if inner == "zip" else pickle.dumps(want)
    pack = PACKERS[suffix]
    packed = pack(b"") + b"".join(pack(data[at : at + 7_000]) for at in range(0, len(data), 7_000))
    (tmp_path / f"a.{suffix}").write_bytes(packed)
    assert_same(anycard.read(tmp_path / f"a.{suffix}"), want)
    assert anycard.scan(tmp_path / f"a.{suffix}").clean
