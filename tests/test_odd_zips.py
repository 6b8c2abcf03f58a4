"""Torch zips as other tools, other machines and other times wrote them; torch itself says what is one."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

import anycard
from anycard.checkpoint import as_numpy
from anycard.containers import inflated
from anycard.containers.zip_directory import read_directory
from anycard.disk.source import StreamSource
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.formats.registry import read_index
from anycard.limits import DEFAULT


def rezip(data: bytes, change: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            for other, held in change(name, old.read(name)):
                new.writestr(other, held)
    return out.getvalue()


def index(data: bytes) -> Index:
    return read_index(StreamSource("test", io.BytesIO(data)))


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def values(data: bytes, name: str = "a") -> list[Any]:
    held: list[Any] = as_numpy(index(data).tree[name]).tolist()
    return held


GIVEN = {"a": torch.arange(9.0), "e": torch.zeros(0), "b": torch.arange(40).reshape(8, 5).t()}


def test_without_crcs() -> None:
    """torch writes 0 for all of them; a single 0 beside others is a CRC."""
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(GIVEN)
    finally:
        torch.serialization.set_crc32_options(True)
    records = read_directory(StreamSource("t", io.BytesIO(data)), DEFAULT)
    assert all(r.crc is None for r in records.values() if r.nbytes)
    assert values(data) == GIVEN["a"].tolist()
    good = saved(GIVEN)
    forged = bytearray(good)
    at = good.rfind(b"archive/data.pkl") - 46
    forged[at + 16 : at + 20] = bytes(4)
    with pytest.raises(FormatError, match="CRC"):
        index(bytes(forged))


def test_deflated_storages() -> None:
    data = rezip(saved(GIVEN), lambda n, b: [(n, b)], zipfile.ZIP_DEFLATED)
    found = index(data)
    for name, given_tensor in GIVEN.items():
        assert as_numpy(found.tree[name]).tolist() == given_tensor.tolist()
    assert anycard.read(io.BytesIO(data))["b"].equal(GIVEN["b"])
    assert anycard.verify(io.BytesIO(data)).ok
    record = found.records["archive/data/2"]
    broken = bytearray(data)
    broken[record.offset + record.stored_nbytes // 2] ^= 0x55
    with pytest.raises(FormatError, match="damaged"):
        as_numpy(index(bytes(broken)).tree["b"])


def test_views_of_a_large_deflated_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is inflated twice at most, however many views there are, and not into memory."""
    monkeypatch.setattr(inflated, "_MOST_KEPT", 1_000)
    rounds: list[str] = []
    pieces = inflated.Inflated._pieces
    monkeypatch.setattr(inflated.Inflated, "_pieces", lambda self: rounds.append("") or pieces(self))
    whole = torch.arange(10_000)
    views = {f"v{number}": whole[9_000 - 100 * number :][:50] for number in range(90)}
    data = rezip(saved(views), lambda n, b: [(n, b)], zipfile.ZIP_DEFLATED)
    with anycard.open(io.BytesIO(data)) as ckpt:
        rounds.clear()
        assert all(torch.equal(ckpt.torch(name), view) for name, view in views.items())
    assert len(rounds) == 2


def test_trailing_data() -> None:
    """As much as torch takes behind the archive, and signatures in it that are no end record."""
    good = saved(GIVEN)
    for tail in (b"x" * 60_000, b"PK\x05\x06", b"\0" * 65_000, b"x" * (69_584 - 22)):
        assert torch.load(io.BytesIO(good + tail), weights_only=True)["a"].equal(GIVEN["a"])
        assert values(good + tail) == GIVEN["a"].tolist()
    for tail in (b"x" * 69_584, b"x" * 200_000):
        with pytest.raises(RuntimeError):
            torch.load(io.BytesIO(good + tail), weights_only=True)
        with pytest.raises(FormatError):
            index(good + tail)


def test_folders_and_cases() -> None:
    good = saved(GIVEN)
    flat = rezip(good, lambda n, b: [(n.removeprefix("archive/"), b)])
    assert values(flat) == GIVEN["a"].tolist()
    upper = rezip(good, lambda n, b: [(n.upper() if "data" in n else n, b)])
    assert values(upper) == GIVEN["a"].tolist()
    bare = rezip(good, lambda n, b: [] if n.endswith(("byteorder", ".format_version", "version")) else [(n, b)])
    assert values(bare) == GIVEN["a"].tolist()
    for change in (
        lambda n, b: [(n, b), (n.upper(), b)][: 1 + n.endswith("data.pkl")],
        lambda n, b: [(n, b), (n.upper(), b)][: 1 + n.endswith("data/0")],
        lambda n, b: [(n, b), ("other/data.pkl", b)][: 1 + n.endswith("data.pkl")],
        lambda n, b: [(n, b"middle" if n.endswith("byteorder") else b)],
    ):  # fmt: skip
        with pytest.raises(FormatError):
            index(rezip(good, change))


def big_endian(array: Any) -> bytes:
    changes = {"archive/byteorder": b"big", "archive/data/0": array.tobytes()}
    return rezip(saved(GIVEN), lambda n, b: [(n, changes.get(n, b))])


def test_big_endian() -> None:
    array = np.arange(9, dtype=">f4")
    swapped = big_endian(array)
    assert values(swapped) == array.tolist()
    assert anycard.read(io.BytesIO(swapped))["a"].tolist() == array.tolist()


def test_zip64_end_record_wins() -> None:
    good = saved(GIVEN)
    lying = bytearray(good)
    end = good.rfind(b"PK\x05\x06")
    lying[end + 8 : end + 20] = struct.pack("<2H2L", 1, 1, 46, 7)
    assert torch.load(io.BytesIO(lying), weights_only=True)["a"].equal(GIVEN["a"])
    assert values(bytes(lying)) == GIVEN["a"].tolist()
    start = good.rfind(b"PK\x06\x06")
    lying = bytearray(good)
    lying[start + 3] ^= 1  # then the classic one holds
    assert torch.load(io.BytesIO(lying), weights_only=True)["a"].equal(GIVEN["a"])
    assert values(bytes(lying)) == GIVEN["a"].tolist()


def with_offset_in_zip64_field() -> bytes:
    """As torch writes it for records behind 4 GiB: sizes in 32 bits, the header's offset in the field."""
    good = saved(GIVEN)
    end64, first = good.rfind(b"PK\x06\x06"), good.find(b"PK\x01\x02")
    size, start = struct.unpack_from("<2Q", good, end64 + 40)
    assert start == first
    entry = bytearray(good[first : good.find(b"PK\x01\x02", first + 4)])
    offset = struct.unpack_from("<L", entry, 42)[0]
    name_size, extra_size = struct.unpack_from("<2H", entry, 28)
    entry[42:46] = b"\xff" * 4
    entry[30:32] = struct.pack("<H", extra_size + 12)
    at = 46 + name_size
    entry[at:at] = struct.pack("<2HQ", 1, 8, offset)
    changed = good[:first] + bytes(entry) + good[first + len(entry) - 12 : end64]
    tail = bytearray(good[end64:])
    tail[40:48] = struct.pack("<Q", size + 12)
    tail[56 + 8 : 56 + 16] = struct.pack("<Q", end64 + 12)
    return changed + bytes(tail)


def test_zip64_field_with_the_offset_alone() -> None:
    changed = with_offset_in_zip64_field()
    assert torch.load(io.BytesIO(changed), weights_only=True)["a"].equal(GIVEN["a"])
    assert values(changed) == GIVEN["a"].tolist()


def test_headers_that_disagree() -> None:
    good = saved(GIVEN)
    other = bytearray(good)
    other[good.find(b"archive/data/0") + 13] = ord("1")
    with pytest.raises(FormatError, match="another name"):
        index(bytes(other))
    records = read_directory(StreamSource("t", io.BytesIO(good)), DEFAULT)
    at = good.rfind(b"archive/data/1") - 46
    moved = bytearray(good)
    moved[at + 20 : at + 28] = struct.pack("<2L", 4_000, 4_000)  # on into the next record
    with pytest.raises(FormatError, match=r"overlaps|cut short"):
        index(bytes(moved))
    assert records["archive/data/1"].nbytes == 0


def test_mark_that_is_damaged() -> None:
    """anycard's own record says whose the names are: its CRC is checked like the pickle's."""
    data = rezip(saved(GIVEN), lambda n, b: [(n, b), ("archive/.anycard.json", b'{"v": 1}')][: 1 + n.endswith("l")])
    assert index(data).mark == {"v": 1}
    with pytest.raises(FormatError, match="CRC"):
        index(data.replace(b'{"v": 1}', b'{"v": 2}'))
