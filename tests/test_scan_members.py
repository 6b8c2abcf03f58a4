"""`anycard scan` follows every stream of bytes from its first one, whatever tells it to be a pickle, or nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

import anycard
from test_scan_archives import archive_of, bad_names

EVIL = b"N0cos\nsystem\n(S'true'\ntR."  # begins with no byte that pickles begin with as a rule


def tar_of(members: dict[str, bytes], mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def array_of(data: bytes, header: str = "'descr': '|O', 'fortran_order': False") -> bytes:
    text = f"{{{header}, 'shape': (1,)}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


TWICE = "'descr': '|u1', 'fortran_order': False, 'descr': '|O'"
OLD_JOBLIB = b"ZF" + hex(len(EVIL)).ljust(19).encode() + zlib.compress(EVIL)
FILES: dict[str, bytes] = {
    "x.pkl.gz": gzip.compress(EVIL), "x.bz2": bz2.compress(EVIL), "x.xz": lzma.compress(EVIL),
    "x.zst": zstandard.compress(EVIL), "x.z": zlib.compress(EVIL), "x.lzma": lzma.compress(EVIL, lzma.FORMAT_ALONE),
    "a member of a zip": archive_of({"weights": EVIL}),
    "a deflated member": archive_of({"weights": EVIL}, zipfile.ZIP_DEFLATED),
    "a member called like a source": archive_of({"x/net.py": EVIL}),
    "a member called like a storage": archive_of({"x/data/0": EVIL}),
    "a member of a tar": tar_of({"weights": EVIL}), "a tar.gz": tar_of({"weights": EVIL}, "w:gz"),
    "a gz in a zip": archive_of({"weights.gz": gzip.compress(EVIL)}),
    "a zip in a tar": tar_of({"x": archive_of({"weights": EVIL})}),
    "an array": array_of(EVIL), "an array that is said twice": array_of(EVIL, TWICE), "old joblib": OLD_JOBLIB,
    "stacked": archive_of({"weights": pickle.dumps(1, 0) + pickle.dumps("a", 0) + EVIL}),
    "behind much": archive_of({"weights": b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"0" + EVIL}),
    "before zeros": archive_of({"weights": EVIL + bytes(4 << 20)}, zipfile.ZIP_DEFLATED),
    "no directory": archive_of({"weights": EVIL}).partition(b"PK\1\2")[0],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_attacks_in_members_of_any_name_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(FILES[name])
    status, names = bad_names(tmp_path / "x")
    assert status == 1 and set(names) == {"os.system"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "x").rename(tmp_path / "folder" / "x")
    assert bad_names(tmp_path / "folder") == (status, names)


@pytest.mark.parametrize("name", ["model.th", "x.weights", "x.model", "weights", "data/0", "x/data/17.storage", "a.py"])
@pytest.mark.parametrize("attack", [EVIL, b"K\x01" + EVIL, b"cos\nsystem\n(S'true'\ntR", b"cos\nsystem\n\xff"])
def test_attacks_in_files_of_any_name_are_found(tmp_path: Path, name: str, attack: bytes) -> None:
    """In a folder; a call that has been made, or what runs code by its name, is told though the pickle breaks off."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(attack)
    assert bad_names(tmp_path) == (1, ["os.system"])


def _words() -> dict[str, bytes]:
    return {
        "labels.txt": b"cat\ndog\nbird\n", "two.txt": b"cats\ndogs\n", ".gitignore": b"cache\nbuild\n.env\n",
        "README.md": b"Version 2 of it\nP is what it says\ncat\nN.\n", "LICENSE": b"Copyright\ncopyright\nall of us\n",
        "In.txt": b"I am here.\n", "N.txt": b"N.", "net.py": b"import os\nimport sys\n\nclass Net:\n    pass\n",
        "conf.yaml": b"copy:\n  a: 1\nbuild:\n  b: 2\n", "p.txt": b"person\ncar\nbus\n", "empty": b"",
        "requirements.txt": b"cython\nnumpy\nRuntime\n", "x.json": b'{"a": 1}', "x.csv": b"class\n1\n2\n",
        "b.md": b"(see)\n",
        "V.txt": b"Vegetables\nPlants\nall\n", "G.txt": b"GPL 3.0 and later", "list.txt": b"a\nb\nc\nd\ne\n",
    }  # fmt: skip


def _binary() -> dict[str, bytes]:
    draw = random.Random(7)
    made = {f"raw {n}": draw.randbytes(2_000) for n in range(300)}
    made |= {f"data/{n}": bytes([n]) + draw.randbytes(50) for n in range(256)}
    # One number in eight bytes, as the count of batches in a BatchNorm: lzma, zlib, PROTO, PK, gzip, bz2.
    numbers = (93, 376, 640, 896, 1152, 1408, 19280, 24184, 35615, 40056, 55928, 0x685A42, 0x088B1F >> 8)
    made |= {f"x/data/{n}": n.to_bytes(8, "little") for n in numbers}
    made |= {f"y/data/{n}": n.to_bytes(8, "little") + bytes(8_000) for n in numbers if n != 93}
    made |= {f"data/weights/weight_{n}": n.to_bytes(8, "little") for n in numbers}
    made["x.png"] = b"\x89PNG\r\n\x1a\n" + draw.randbytes(500)
    made["x.jpg"] = b"\xff\xd8\xff\xe0" + draw.randbytes(500)
    made["x.gif"] = b"GIF89a" + draw.randbytes(500)
    made["x.bmp"] = b"BM\x36\x03\0\0\0\0\0\0\x36\0\0\0" + draw.randbytes(800)
    made["x.npy"] = array_of(draw.randbytes(800), "'descr': '<f4', 'fortran_order': False")
    made["a.xz"] = lzma.compress(b"text")
    return made


@pytest.mark.parametrize("held", [_words, _binary])
@pytest.mark.parametrize("where", ["folder", "zip", "tar"])
def test_what_is_no_pickle_is_clean(tmp_path: Path, held: Callable[[], dict[str, bytes]], where: str) -> None:
    """Words that happen to name something and do nothing with it, pictures, raw bytes of tensors."""
    members = held()
    if where == "folder":
        for name, data in members.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    else:
        (tmp_path / "x").write_bytes((archive_of if where == "zip" else tar_of)(members))
    report = anycard.scan(tmp_path)
    assert (report.unreadable, report.bad) == ([], [])


def test_harmless_pickles_of_any_name_are_clean(tmp_path: Path) -> None:
    """Protocol 0, names of the closed set; what follows the last of them is of no account where no name says pickle."""
    data = pickle.dumps(OrderedDict(a=1), 0)
    for name in ("weights", "x.model"):
        (tmp_path / name).write_bytes(data + b"text behind it")
    assert bad_names(tmp_path) == (0, [])
    (tmp_path / "x.bin").write_bytes(data + b"text behind it")
    assert bad_names(tmp_path) == (2, [])


def test_a_pickle_that_names_what_nobody_knows_and_is_one_to_its_last_byte_is_told(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"cat\ndog\n.")
    assert bad_names(tmp_path) == (1, ["at.dog"])


def test_storages_of_a_torch_zip_are_bytes(tmp_path: Path) -> None:
    """torch takes its records of numbers for bytes, whatever they are; unpacked, each is a file that may be loaded."""
    torch.save({"w": torch.frombuffer(bytearray(EVIL), dtype=torch.uint8)}, tmp_path / "a.pt")
    assert bad_names(tmp_path / "a.pt") == (0, [])
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        archive.extractall(tmp_path / "out")
        names = archive.namelist()
    assert bad_names(tmp_path / "out") == (1, ["os.system"])
    elsewhere = {("other" + name[1:] if "/data/" in name else name): b"" for name in names}
    assert any(name.startswith("other") for name in elsewhere)
    held = {name: EVIL if name.startswith("other") else b"N." for name in elsewhere}
    (tmp_path / "b.pt").write_bytes(archive_of(held))
    assert bad_names(tmp_path / "b.pt") == (1, ["os.system"])


@pytest.mark.parametrize("content", [b"some words\n", b"", b"\xff\xfe", b"N.words", b"B\xff\xff\xff\x7f"])
def test_an_unpacked_file_is_told_as_it_would_be_by_itself(tmp_path: Path, content: bytes) -> None:
    """What is no pickle is not clean where somebody asks for that very file, packed or not."""
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "packed").write_bytes(gzip.compress(content))
    plain, packed = anycard.scan(tmp_path / "plain"), anycard.scan(tmp_path / "packed")
    assert plain.unreadable and packed.unreadable == [f"unpacked: {why}" for why in plain.unreadable]


def test_what_goes_on_behind_the_bytes_that_are_looked_at_is_not_clean(tmp_path: Path) -> None:
    """A record that inflates like zeros, a text that is packed twice."""
    long = b"X" + struct.pack("<I", 8 << 20) + bytes(8 << 20) + b"0" + EVIL
    (tmp_path / "a.zip").write_bytes(archive_of({"weights": long}, zipfile.ZIP_DEFLATED))
    assert bad_names(tmp_path / "a.zip") == (2, [])
    (tmp_path / "b.zip").write_bytes(archive_of({"weights.gz": gzip.compress(long)}))
    assert bad_names(tmp_path / "b.zip") == (2, [])
    (tmp_path / "c.zip").write_bytes(archive_of({"weights": bytes(8 << 20)}, zipfile.ZIP_DEFLATED))
    assert bad_names(tmp_path / "c.zip") == (0, [])


def test_files_within_files_end(tmp_path: Path) -> None:
    """Deeper than five an archive is not clean, nor a pickle; words are."""
    for innermost, status in ((b"words", 0), (EVIL, 2), (pickle.dumps({"a": 1}), 2), (archive_of({}), 2)):
        data = innermost
        for _ in range(6):
            data = archive_of({"x": data})
        (tmp_path / "a").write_bytes(data)
        assert bad_names(tmp_path / "a")[0] == status


def test_the_name_of_a_packed_member_tells(tmp_path: Path) -> None:
    """A pickle that is cut short is not clean where the name says that it is one."""
    cut = gzip.compress(pickle.dumps({"a": 1}, 0)[:-5])
    (tmp_path / "a.zip").write_bytes(archive_of({"x.pkl.gz": cut}))
    assert bad_names(tmp_path / "a.zip") == (2, [])
    (tmp_path / "a.zip").write_bytes(archive_of({"x.txt.gz": cut}))
    assert bad_names(tmp_path / "a.zip") == (0, [])
    (tmp_path / "a.zip").write_bytes(archive_of({"x": b"\x04\x22\x4d\x18" + bytes(40)}))
    assert bad_names(tmp_path / "a.zip") == (2, [])  # lz4: nothing looks into it


@pytest.mark.parametrize("size", range(6, 13))
def test_arrays_cut_within_their_headers_are_told(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.npy").write_bytes(array_of(b"")[:size])
    assert bad_names(tmp_path / "a.npy") == (2, [])


def test_zeros_as_numpy_writes_them_are_clean(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1 << 20), b=np.arange(9))
    assert bad_names(tmp_path / "a.npz") == (0, [])
