"""Files that hold checkpoints: zips, tars, compressed files; an unpacked torch zip."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

import anycard
from anycard import ChoiceError
from anycard.checkpoint import open_checkpoint
from anycard.operations.fingerprinting import fingerprint
from helpers import assert_same, filled, unchanged, weights


def net() -> nn.Sequential:
    """A small model."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def packed(value: object, legacy: bool = False) -> bytes:
    """A torch file in memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


WANT = weights(filled(net()))
OTHER = weights(filled(net(), 4))
POLICY = {
    "data": b"{}", "policy.pth": packed(WANT), "policy.optimizer.pth": packed({"state": {}}),
    "pytorch_variables.pth": packed(None), "_stable_baselines3_version": b"2.3.0",
}  # fmt: skip
TWO = {
    "notes.txt": b"x",
    "actor.pt": packed(WANT),
    "nets/critic.safetensors": save(OTHER),
    "old.th": packed(OTHER, True),
}


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes], mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


HOLDERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "stored.zip": zipped,
    "deflated.zip": lambda p, f: zipped(p, f, zipfile.ZIP_DEFLATED),
    "pax.nemo": tarred,
    "gnu.tar": lambda p, f: tarred(p, f, kind=tarfile.GNU_FORMAT),
    "ustar.tar": lambda p, f: tarred(p, f, kind=tarfile.USTAR_FORMAT),
    "gz.nemo": lambda p, f: tarred(p, f, "w:gz"),
    "x.tar.xz": lambda p, f: tarred(p, f, "w:xz"),
    "x.tar.bz2": lambda p, f: tarred(p, f, "w:bz2"),
}


@pytest.fixture(params=HOLDERS)
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Writes files into one kind of holder."""
    return lambda files: HOLDERS[request.param](tmp_path / request.param, files)


def test_the_one_that_is_meant(holder: Callable[[dict[str, bytes]], Path]) -> None:
    """A policy's archive gives the policy; all bits, also into a model."""
    path = holder(POLICY)
    assert_same(anycard.read(path), WANT)
    assert_same(weights(anycard.load(path, net)), WANT)
    with path.open("rb") as file:
        assert_same(anycard.read(file), WANT)
    assert anycard.verify(path).ok


def test_several_are_a_choice(holder: Callable[[dict[str, bytes]], Path]) -> None:
    """All are named, and each can be picked, by every verb that takes a file."""
    path = holder(TWO)
    model = filled(net(), 2)
    with unchanged(model), pytest.raises(ChoiceError, match=r"'actor\.pt', 'nets/critic\.safetensors', 'old\.th'"):
        anycard.load(path, model)
    assert_same(weights(anycard.load(path, model, member="actor.pt")), WANT)
    for member in ("nets/critic.safetensors", "old.th"):
        assert_same(anycard.read(path, member=member), OTHER)
    assert fingerprint(path, member="old.th") == fingerprint(path, member="nets/critic.safetensors")
    assert anycard.verify(path, member="actor.pt").checked == len(WANT)
    assert not anycard.plan(path, net, member="actor.pt").missing
    with pytest.raises(ChoiceError, match="no member"):
        anycard.read(path, member="nobody.pt")
    with pytest.raises(anycard.FormatError, match=r"notes\.txt"):
        anycard.read(path, member="notes.txt")


def test_command_line(tmp_path: Path) -> None:
    """--member goes with show and convert; without it the members are named, exit 2."""
    path = str(zipped(tmp_path / "two.zip", TWO))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "anycard", *args], capture_output=True, text=True)

    asked = run("show", path)
    assert asked.returncode == 2 and "actor.pt" in asked.stderr and "critic.safetensors" in asked.stderr
    shown = json.loads(run("show", path, "--member", "actor.pt", "--json").stdout)
    assert set(shown["tensors"]) == set(WANT)
    assert run("verify", path, "--member", "actor.pt").returncode == 0
    assert run("verify", path).returncode == 2
    assert run("convert", path, str(tmp_path / "c.pth"), "--member", "old.th").returncode == 0
    assert_same(anycard.read(tmp_path / "c.pth"), OTHER)


def test_stored_members_are_ranges_of_the_file(tmp_path: Path) -> None:
    """No second copy: tensors lie in the outer file, at offsets in it."""
    for path in (zipped(tmp_path / "a.zip", POLICY), tarred(tmp_path / "a.nemo", POLICY)):
        data = path.read_bytes()
        with anycard.open(path) as ckpt:
            info = ckpt.tensors["0.weight"]
            assert info.file == str(path) and info.offset is not None
            assert data[info.offset : info.offset + info.nbytes] == WANT["0.weight"].numpy().tobytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("inner", ["zip", "policy", "pickle"])
def test_zstd(tmp_path: Path, inner: str) -> None:
    """Read where its package is there; one that lies about its size is a bomb."""
    zstandard = pytest.importorskip("zstandard")
    policy = zipped(tmp_path / "p.zip", POLICY).read_bytes()
    data = {"zip": packed(WANT), "policy": policy, "pickle": pickle.dumps(WANT)}[inner]
    path = tmp_path / "model.pth.zst"
    path.write_bytes(zstandard.compress(data, 19))
    assert_same(anycard.read(path), WANT)
    path.write_bytes(zstandard.compress(data)[:-20])
    with pytest.raises(anycard.FormatError):
        anycard.read(path)
    path.write_bytes(zstandard.compress(data + bytes(1 << 30)))
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.read(path)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("inner", ["zip", "legacy", "safetensors", "policy"])
def test_compressed_checkpoints(tmp_path: Path, suffix: str, inner: str) -> None:
    """One file in a compressed one; an archive in it too."""
    policy = zipped(tmp_path / "p.zip", POLICY).read_bytes()
    data = {"zip": packed(WANT), "legacy": packed(WANT, True), "safetensors": save(WANT), "policy": policy}[inner]
    path = tmp_path / f"model.pth.{suffix}"
    path.write_bytes(PACKERS[suffix](data))
    assert_same(anycard.read(path), WANT)
    path.write_bytes(PACKERS[suffix](data)[:-20])
    with pytest.raises(anycard.FormatError):
        anycard.read(path)


def test_nothing_stays_open_or_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was inflated is gone when the checkpoint is closed, or could not be opened."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    paths = [HOLDERS[name](tmp_path / name, POLICY) for name in HOLDERS]
    bad = zipped(tmp_path / "bad.zip", {"a.pth": packed(WANT)[:-30]}, zipfile.ZIP_DEFLATED)
    before = set(Path("/proc/self/fd").iterdir())
    for path in paths:
        with open_checkpoint(path) as ckpt:
            assert ckpt.tensors and not list((tmp_path / "t").iterdir())
    with pytest.raises(anycard.FormatError, match=r"a\.pth"):
        anycard.read(bad)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_damage_in_a_member(tmp_path: Path) -> None:
    """Found where checksums are: of the torch zip inside, or of what is deflated."""
    path = zipped(tmp_path / "a.zip", POLICY)
    with anycard.open(path) as ckpt:
        at = ckpt.tensors["0.weight"].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert anycard.verify(path).damaged == ("0.weight",)
    nemo = tarred(tmp_path / "a.nemo", POLICY)
    data = bytearray(nemo.read_bytes())
    data[10] ^= 1
    nemo.write_bytes(data)
    with pytest.raises(anycard.FormatError, match="checksum"):
        anycard.read(nemo)


LONG = "/".join(["folder-with-a-name"] * 6) + "/weights-of-the-model.pth"


def test_long_names_in_tars(tmp_path: Path) -> None:
    """More than 100 characters: in pax records, in GNU's way, in a prefix."""
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        path = tarred(tmp_path / f"{kind}.tar", {"a.txt": b"", LONG: packed(WANT)}, kind=kind)
        assert_same(anycard.read(path, member=LONG), WANT)
        assert_same(anycard.read(path), WANT)


def test_tar_that_lies(tmp_path: Path) -> None:
    """Members beyond the end, and cuts anywhere."""
    data = tarred(tmp_path / "a.tar", {"a.pth": packed(WANT)}).read_bytes()
    for end in (513, 600, 1500, len(packed(WANT))):
        (tmp_path / "a.tar").write_bytes(data[:end])
        with pytest.raises(anycard.FormatError):
            anycard.read(tmp_path / "a.tar")


def test_files_in_files_without_end(tmp_path: Path) -> None:
    """gzip in gzip in gzip, and zips in zips."""
    data = packed(WANT)
    for _ in range(8):
        data = gzip.compress(data)
    (tmp_path / "a.gz").write_bytes(data)
    with pytest.raises(anycard.FormatError, match="files in files"):
        anycard.read(tmp_path / "a.gz")
    data = packed(WANT)
    for _ in range(8):
        data = zipped(tmp_path / "a.zip", {"a.zip": data}).read_bytes()
    with pytest.raises(anycard.FormatError, match="files in files"):
        anycard.read(tmp_path / "a.zip")


def test_bombs(tmp_path: Path) -> None:
    """What inflates to far more than weights do is not inflated."""
    (tmp_path / "a.gz").write_bytes(gzip.compress(packed(WANT) + b"\0" * (70 << 20)))
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.read(tmp_path / "a.gz")
    zipped(tmp_path / "a.zip", {"a.pth": b"\0" * (70 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.read(tmp_path / "a.zip")


def test_archives_without_checkpoints(tmp_path: Path) -> None:
    """The error says what is in them."""
    for path in (zipped(tmp_path / "a.zip", {"a.txt": b"x"}), tarred(tmp_path / "a.tar", {"a.txt": b"x"})):
        with pytest.raises(anycard.FormatError, match=r"a\.txt"):
            anycard.read(path)


def test_unpacked_torch_zip(tmp_path: Path) -> None:
    """A folder of a torch zip's records, given itself or the folder around it."""
    (tmp_path / "net.pth").write_bytes(packed(WANT))
    with zipfile.ZipFile(tmp_path / "net.pth") as archive:
        archive.extractall(tmp_path / "out")
    inner = next((tmp_path / "out").iterdir())
    for path in (tmp_path / "out", inner):
        assert_same(anycard.read(path), WANT)
        assert anycard.verify(path).ok
    assert_same(weights(anycard.load(inner, net)), WANT)
    anycard.convert(inner, tmp_path / "again.pth")
    assert_same(torch.load(tmp_path / "again.pth"), WANT)
    (inner / "data" / "0").write_bytes(b"xy")
    with pytest.raises(anycard.FormatError, match="storage 0"):
        anycard.read(inner)
    (inner / "data" / "0").unlink()
    with pytest.raises(anycard.FormatError, match="data/0"):
        anycard.read(inner)


@pytest.mark.parametrize("first", ["metadata.pkl", "train_data.pkl", "a/b/data.pkl"])
def test_a_name_that_ends_like_a_torch_zips_pickle_makes_none(tmp_path: Path, first: str) -> None:
    """Only `data.pkl` at the top or in one folder begins a torch zip; other archives hold checkpoints."""
    torch.save(WANT, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(first, pickle.dumps({"a": 1}))
        archive.write(tmp_path / "m.pt", "model.pth")
    assert_same(anycard.read(tmp_path / "z.zip", member="model.pth"), WANT)


def test_a_diffusers_folder_in_two_precisions(tmp_path):
    """The full weights are meant, as where transformers writes two."""
    anycard.save(dict(WANT), tmp_path / "diffusion_pytorch_model.safetensors")
    anycard.save({name: t.half() for name, t in WANT.items()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(anycard.read(tmp_path), WANT)
