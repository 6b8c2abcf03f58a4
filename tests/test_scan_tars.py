"""Tars: a scan and a read look at the members that Python's tarfile gives to torch, or refuse the archive."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import anycard
from helpers import assert_same, quiet
from test_formats_tar import tar
from test_scan_archives import archive_of, bad_names, edited

EVIL = b"cabsent\nname\n)R."
WEIGHT = torch.arange(6.0).view(2, 3)
NAMES = ("sys_info", "pickle", "tensors", "storages")


def parts() -> dict[str, bytes]:
    """The members of a clean legacy tar."""
    with tarfile.open(fileobj=io.BytesIO(tar({"a": WEIGHT}, [WEIGHT]))) as archive:
        return {name: archive.extractfile(name).read() for name in NAMES}  # type: ignore[union-attr]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", size: int = -1) -> bytes:
    """A header and its bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if size < 0 else size
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def resummed(header: bytes, signed: bool = False) -> bytes:
    """A header with its checksum made anew."""
    held = header[:148] + b" " * 8 + header[156:]
    total = sum(byte - 256 * (signed and byte > 127) for byte in held[:512])
    return held[:148] + b"%06o\0 " % total + held[156:]


def old(header: bytes) -> bytes:
    """As tars were before POSIX: nothing behind the name of a link's target."""
    return resummed(header[:257] + bytes(255) + header[512:])


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE, padding: bytes = b"") -> bytes:
    """A pax header; what stands in its padding is not counted."""
    data = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        size = len(body) + len(str(len(body) + 2))
        data += str(size).encode() + body
    made = member("pax", data, kind)
    return made[: 512 + len(data)] + padding + made[512 + len(data) + len(padding) :]


def clean() -> bytes:
    return b"".join(member(name, data) for name, data in parts().items())


FILLERS = b"".join(member(f"{n}", b"x") for n in range(61))
# What torch takes for the pickle, in a tar of clean members.
ATTACKS: dict[str, Callable[[], bytes]] = {
    "far behind": lambda: clean() + FILLERS + member("pickle", EVIL),
    "twice": lambda: clean() + member("pickle", EVIL),
    "of an unknown type": lambda: clean() + member("pickle", EVIL, b"Z"),
    "contiguous": lambda: clean() + member("pickle", EVIL, tarfile.CONTTYPE),
    "a hard link": lambda: clean() + member("x", EVIL) + member("pickle", kind=tarfile.LNKTYPE, link="x"),
    "a symbolic link": lambda: member("x", EVIL) + clean() + member("pickle", kind=tarfile.SYMTYPE, link="x"),
    "behind a link that has a size": lambda: (
        clean() + member("y", kind=tarfile.LNKTYPE, link="sys_info", size=len(member("pickle", EVIL)))
        + member("pickle", EVIL)
    ),
    "behind a folder that has a size": lambda: (
        clean() + member("y", kind=tarfile.DIRTYPE, size=1_024) + member("pickle", EVIL)
    ),
    "behind an old folder that has a size": lambda: (
        clean() + member("y/", kind=tarfile.AREGTYPE, size=1_024) + member("pickle", EVIL)
    ),
    "by pax": lambda: clean() + pax({"path": "pickle"}) + member("x", EVIL),
    "by Solaris' pax": lambda: clean() + pax({"path": "pickle"}, b"X") + member("x", EVIL),
    "by pax with a slash": lambda: clean() + pax({"path": "pickle/"}) + member("x", EVIL),
    "by pax in the padding": lambda: clean() + pax({"a": "b"}, padding=b"15 path=pickle\n") + member("x", EVIL),
    "by the first of two pax": lambda: clean() + pax({"path": "pickle"}) + pax({"path": "y"}) + member("x", EVIL),
    "by pax for all": lambda: member("x", EVIL) + pax({"size": "2"}, b"g") + clean(),
    "by GNU": lambda: clean() + member("long", b"pickle\0", tarfile.GNUTYPE_LONGNAME) + member("x", EVIL),
    "by a size of pax": lambda: clean() + pax({"size": "600"}) + member("y", b"z" * 1_024) + member("pickle", EVIL),
    "old": lambda: old(clean()) + old(member("pickle", EVIL)),
    "signed sums": lambda: clean() + resummed(edited(member("pickle", EVIL), 300, b"\xff"), signed=True),
    "storages": lambda: clean() + member("storages", pickle.dumps(0) + EVIL),
    "tensors": lambda: clean() + member("tensors", EVIL),
    "storages by a link": lambda: (
        clean() + member("x", pickle.dumps(0) + EVIL) + member("storages", kind=tarfile.LNKTYPE, link="x")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_whatever_torch_takes_for_a_member_is_found(tmp_path: Path, name: str) -> None:
    """torch would import; the scan is not clean, and reading does not take the clean member instead."""
    path = tmp_path / "a.pt"
    path.write_bytes(ATTACKS[name]() + bytes(1_024))
    if name not in ("by a size of pax", "by pax for all"):  # those break torch
        with quiet(), pytest.raises(ModuleNotFoundError, match="absent"):
            torch.load(path, weights_only=False)
    status, names = bad_names(path)
    assert status in (1, 2) and set(names) <= {"absent.name"}
    assert status == 1 or name in REFUSED
    with pytest.raises(anycard.FormatError):
        anycard.read(path)


# Where what stands there is not looked at any more, which is said.
REFUSED = (
    "by pax in the padding", "by the first of two pax", "by a size of pax", "storages", "storages by a link",
)  # fmt: skip


def test_old_headers_are_read(tmp_path: Path) -> None:
    """Without the magic that POSIX has, which the first checkpoints may lack."""
    data = b"".join(old(member(name, held)) for name, held in parts().items()) + bytes(1_024)
    assert b"ustar" not in data
    (tmp_path / "a.pt").write_bytes(data)
    with quiet():
        assert_same(torch.load(tmp_path / "a.pt", weights_only=False), {"a": WEIGHT})
    assert_same(anycard.read(tmp_path / "a.pt"), {"a": WEIGHT})
    assert bad_names(tmp_path / "a.pt") == (0, [])
    evil = parts() | {"pickle": EVIL}
    (tmp_path / "a.pt").write_bytes(b"".join(old(member(name, held)) for name, held in evil.items()) + bytes(1_024))
    assert bad_names(tmp_path / "a.pt") == (1, ["absent.name"])


def test_members_far_behind_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(FILLERS + clean() + bytes(1_024))
    assert_same(anycard.read(tmp_path / "a.pt"), {"a": WEIGHT})
    assert bad_names(tmp_path / "a.pt") == (0, [])


def test_other_members_of_a_legacy_tar_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(clean() + member("weights", b"N0" + EVIL) + bytes(1_024))
    assert bad_names(tmp_path / "a.pt") == (1, ["absent.name"])


def evil_tar(first: str = "sys_info") -> bytes:
    held = parts() | {"pickle": EVIL}
    return b"".join(member(first if name == "sys_info" else name, data) for name, data in held.items()) + bytes(1_024)


def test_a_tar_that_is_another_format_too_is_followed(tmp_path: Path) -> None:
    """torch asks for a tar first, unless the file begins as a zip's records do."""
    pickled = evil_tar("N.")
    zipped = evil_tar("PK\5\6") + archive_of({"data.pkl": pickle.dumps({})})
    for data in (pickled, zipped):
        (tmp_path / "a.pt").write_bytes(data)
        with quiet(), pytest.raises(ModuleNotFoundError, match="absent"):
            torch.load(tmp_path / "a.pt", weights_only=False)
        status, names = bad_names(tmp_path / "a.pt")
        assert (status, set(names)) == (1, {"absent.name"})


def test_a_first_member_of_words_is_clean(tmp_path: Path) -> None:
    """A tar begins with a name, and c is an opcode that takes two lines."""
    (tmp_path / "a.tar").write_bytes(member("config.yaml", b"a: 1\nb: 2\nc: 3\n") + bytes(1_024))
    assert bad_names(tmp_path / "a.tar") == (0, [])


def test_links_and_folders_of_other_names_are_of_no_account(tmp_path: Path) -> None:
    more = member("d/", kind=tarfile.DIRTYPE) + member("d/x", kind=tarfile.SYMTYPE, link="/etc/passwd")
    (tmp_path / "a.tar").write_bytes(more + member("x.pkl", pickle.dumps(1)) + bytes(1_024))
    assert bad_names(tmp_path / "a.tar") == (0, [])
