"""`anycard scan` follows all streams of a compressed file, as far as a loader reads them."""

from __future__ import annotations

import gzip
import lzma
import pickle
import random
import zlib
from pathlib import Path

import pytest

import anycard
from test_scan_archives import archive_of, bad_names
from test_streams import PACKERS

EVIL = b"cos\nsystem\n(S'true'\ntR."


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_scan_looks_at_all_streams(tmp_path: Path, suffix: str) -> None:
    """Also where the first ones hold nothing, and where a later one is damaged behind what has been read by then."""
    pack, path = PACKERS[suffix], tmp_path / f"a.pkl.{suffix}"
    large = pack(EVIL + random.Random(2).randbytes(2_000_000))
    for data in (pack(b"") + pack(EVIL), pack(EVIL[:9]) + pack(b"") * 3 + pack(EVIL[9:])):
        path.write_bytes(data)
        assert bad_names(path) == (1, ["os.system"])
    path.write_bytes(pack(b"") + large[:-1_000] + bytes(1_000))
    assert not anycard.scan(path).clean


@pytest.mark.parametrize(
    "second",
    [
        lzma.compress(EVIL, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 256 << 20}]),
        lzma.compress(EVIL, lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": 256 << 20}]),
    ],
)
def test_a_stream_that_needs_too_much_memory_is_not_taken_for_none(tmp_path: Path, second: bytes) -> None:
    """Python's module would read it; where it is not first, too, and in a member of any name."""
    for data in (second, lzma.compress(b"") + second):
        assert lzma.decompress(data) == EVIL
        (tmp_path / "x").write_bytes(archive_of({"weights": data}))
        assert bad_names(tmp_path / "x") == (2, [])


def test_bytes_behind_zlib_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.pkl.z").write_bytes(zlib.compress(pickle.dumps(1)) + b"more")
    assert bad_names(tmp_path / "a.pkl.z") == (2, [])


def test_what_a_damaged_stream_gives_first_is_told(tmp_path: Path) -> None:
    """A loader has run it by then."""
    data = gzip.compress(EVIL + random.Random(3).randbytes(1_000_000))
    (tmp_path / "a.pkl.gz").write_bytes(data[:-2_000])
    assert bad_names(tmp_path / "a.pkl.gz") == (1, ["os.system"])
    data = zlib.compress(EVIL + bytes(3_000), 0)
    (tmp_path / "a.zip").write_bytes(archive_of({"weights": data[:-4] + bytes(4)}))
    assert bad_names(tmp_path / "a.zip") == (1, ["os.system"])


def test_what_begins_like_a_stream_may_be_a_pickle(tmp_path: Path) -> None:
    """B is an opcode: what follows it is a length."""
    data = b"BZh9\0" + bytes(int.from_bytes(b"Zh9\0", "little")) + EVIL
    (tmp_path / "a.pkl").write_bytes(data)
    assert bad_names(tmp_path / "a.pkl") == (1, ["os.system"])
