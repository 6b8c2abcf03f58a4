"""Pickles of which two loaders, or a loader and we, would read different bytes."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import joblib
import pytest
import torch

import anycard
from bombs import text
from test_scan_archives import archive_of, bad_names


def framed(frame: bytes, rest: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", len(frame)) + frame + rest


def test_a_frame_that_ends_within_an_opcode_is_not_clean(tmp_path: Path) -> None:
    """C forgets what is left of it: a text of 15 bytes to us is one of 0 bytes, and a call, to torch."""
    evil = b"\0\0\0\0cabsent\nname\n)R."
    data = framed(b"X" + struct.pack("<H", len(evil) - 2), evil + b".")
    assert pickle.loads(data) == evil[2:].decode()
    records = {"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"}
    (tmp_path / "a.pt").write_bytes(archive_of(records))
    with pytest.raises(ModuleNotFoundError, match="absent"):
        torch.load(tmp_path / "a.pt", weights_only=False)
    assert bad_names(tmp_path / "a.pt")[0] == 2
    (tmp_path / "a.zip").write_bytes(archive_of({"weights": b"N0" + data[2:]}))
    assert bad_names(tmp_path / "a.zip")[0] == 2


def test_frames_within_frames_are_not_clean(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(framed(framed(b"K\x01", b"")[2:] + b"0N", b"."))
    assert bad_names(tmp_path / "a.pkl")[0] == 2
    for value in (["x" * 70_000, b"y" * 200_000, {"a": 1}], list(range(100_000))):
        for protocol in (4, 5):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
            assert bad_names(tmp_path / "a.pkl") == (0, [])


WRAPPER = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n"


def dtype(code: str = "u1", size: int = 1) -> bytes:
    return (
        b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R(K\x03" + text("|") + b"NNNK" + bytes([size]) + b"K\x01K\0tb"
    )


def described(nbytes: int, kind: bytes) -> bytes:
    """The state of an array's description, and the BUILD behind which its bytes stand."""
    shape = text("shape") + b"K" + bytes([nbytes]) + b"\x85" + text("order") + text("C")
    more = text("subclass") + b"cnumpy\nndarray\n" + text("allow_mmap") + b"\x88"
    return b"}(" + text("dtype") + kind + shape + more + b"ub"


def test_what_only_joblib_takes_for_an_array_is_followed(tmp_path: Path) -> None:
    """`pickle.load` takes the array's bytes for opcodes; a name that says joblib is believed."""
    raw = b"0cabsent\nname\n)R."
    data = b"\x80\x02" + WRAPPER + b")\x81" + described(len(raw), dtype()) + raw + b"."
    for name, status in (("a.pkl", 1), ("a.joblib", 0)):
        (tmp_path / name).write_bytes(data)
        assert bad_names(tmp_path / name) == (status, ["absent.name"] * status)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        pickle.loads(data)
    assert joblib.load(tmp_path / "a.joblib").tobytes() == raw


@pytest.mark.parametrize(
    "body",
    [
        b")\x812" + described(1, dtype()) + b"N0" + described(1, dtype()) + b"N",
        b")\x81q\x05" + described(1, dtype()) + b"N0h\x05" + described(1, dtype()) + b"N",
        b")\x81" + described(1, dtype("V1", 7)) + b"N" * 7,
        b"(cnumpy\nndarray\nK\x01\x85" + text("C") + dtype() + b"\x88K\x10tR}b\0N",
        b")\x81" + described(1, dtype())[:-1] + b"}\x86bN",
    ],
)
def test_arrays_that_joblib_does_not_write_so(tmp_path: Path, body: bytes) -> None:
    """Where joblib takes other bytes for the array than we would, nothing is clean, and nothing is read."""
    (tmp_path / "a.joblib").write_bytes(b"\x80\x02" + WRAPPER + body + b".")
    assert joblib.load(tmp_path / "a.joblib").shape == (1,)
    assert bad_names(tmp_path / "a.joblib")[0] == 2
    with pytest.raises(anycard.FormatError):
        anycard.open(tmp_path / "a.joblib")
