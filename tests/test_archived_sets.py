"""Checkpoints of several files inside an archive: read as if it were unpacked, without unpacking it."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import joblib
import pytest
import torch
from safetensors.torch import save
from torch import nn

import anycard
from anycard import ChoiceError
from helpers import assert_same, filled, weights
from test_folders_dcp import saved
from test_folders_members import HOLDERS, packed
from test_folders_shards import net, sharded
from test_formats_tar import tar

WANT = weights(filled(net()))


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Name -> bytes of the files in a folder."""
    return {prefix + path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("prefix", ["", "run/model/"])
@pytest.mark.parametrize("form", ["safetensors", "torch", "no index", "dcp", "unpacked"])
def test_sets_inside(tmp_path: Path, kind: str, prefix: str, form: str) -> None:
    """In every kind of archive, at its top or below: every bit, also into a model, and checksums are checked."""
    if form == "unpacked":
        inside = unpacked(WANT, prefix or "net/")
    elif form == "dcp":
        inside = files_of(saved(tmp_path / "c", dict(WANT)), prefix)
    else:
        index = sharded(tmp_path / "m", WANT, form != "torch")
        if form == "no index":
            index.unlink()
        inside = files_of(index.parent, prefix)
    path = HOLDERS[kind](tmp_path / kind, {"readme.txt": b"x", **inside})
    assert_same(anycard.read(path), WANT)
    assert_same(weights(anycard.load(path, net)), WANT)
    report = anycard.verify(path)
    assert report.ok
    summed = form in ("torch", "dcp") or (form == "unpacked" and kind == "stored.zip")
    assert report.checked == (len(WANT) if summed else 0)


def unpacked(want: dict[str, torch.Tensor], above: str) -> dict[str, bytes]:
    """The records of a torch zip, in a folder two levels deep, where no torch zip has them."""
    buffer = io.BytesIO()
    torch.save(want, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {f"{above}deep/" + n.partition("/")[2]: archive.read(n) for n in archive.namelist()}


FLOATS = {name: tensor for name, tensor in WANT.items() if tensor.is_floating_point()}
BIG = {name: tensor.repeat(1000) for name, tensor in FLOATS.items() if tensor.dim() == 1}
MEMBERS: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "shards": lambda work: files_of(sharded(work / "m", FLOATS).parent),
    "safetensors": lambda work: {"a.safetensors": save(FLOATS)},
    "torch zip": lambda work: {"a.pt": packed(FLOATS)},
    "legacy stream": lambda work: {"a.pt": packed(FLOATS, True)},
    "legacy tar": lambda work: {"a.pt": tar(FLOATS, list(FLOATS.values()))},
    "plain pickle": lambda work: {"a.pkl": pickle.dumps(BIG)},
    "joblib": lambda work: {"a.pkl": dumped({name: tensor.numpy() for name, tensor in BIG.items()})},
}


def dumped(value: object) -> bytes:
    """What joblib writes."""
    out = io.BytesIO()
    joblib.dump(value, out)
    return out.getvalue()


@pytest.mark.parametrize("form", MEMBERS)
def test_tensors_lie_in_the_archive(tmp_path: Path, form: str) -> None:
    """Stored members are not copied."""
    inside = MEMBERS[form](tmp_path)
    path = HOLDERS["stored.zip"](tmp_path / "a.zip", {"x.txt": b"x" * 99, **inside})
    data = path.read_bytes()
    with anycard.open(path) as ckpt:
        want = BIG if set(ckpt.tensors) == set(BIG) else FLOATS
        assert set(ckpt.tensors) == set(want)
        for name, info in ckpt.tensors.items():
            assert info.file == str(path) and info.offset is not None
            assert data[info.offset : info.offset + info.nbytes] == want[name].numpy().tobytes()
    assert_same(anycard.read(path), want)


def test_several_sets_are_a_choice(tmp_path: Path) -> None:
    """A set is one member, called by its index, its metadata or its numbers' place."""
    other = weights(filled(net(), 4))
    index = sharded(tmp_path / "a", WANT)
    second = sharded(tmp_path / "b", other)
    second.unlink()
    third = saved(tmp_path / "c", dict(other))
    inside = {**files_of(index.parent, "a/"), **files_of(second.parent, "b/"), **files_of(third, "c/")}
    path = HOLDERS["stored.zip"](tmp_path / "all.zip", inside)
    with pytest.raises(ChoiceError, match="holds 3 checkpoints") as caught:
        anycard.read(path)
    shards = next(name for name in str(caught.value).split("'") if "*" in name)
    assert_same(anycard.read(path, member="a/model.safetensors.index.json"), WANT)
    assert_same(anycard.read(path, member=shards), other)
    assert_same(anycard.read(path, member="c/.metadata"), other)
    one = next(name for name in inside if name.startswith("a/model-00001"))
    assert set(anycard.read(path, member=one)) < set(WANT)
    shown = subprocess.run(
        [sys.executable, "-m", "anycard", "show", "--json", str(path), "--member", "c/.metadata"],
        capture_output=True,
        check=True,
    )
    assert set(json.loads(shown.stdout)["tensors"]) == set(WANT)


@pytest.mark.parametrize("form", ["index", "no index", "dcp"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, form: str) -> None:
    """As in a folder."""
    folder = saved(tmp_path / "c", dict(WANT)) if form == "dcp" else sharded(tmp_path / "m", WANT).parent
    inside = files_of(folder)
    gone = "__0_0.distcp" if form == "dcp" else next(name for name in inside if "-00002-of-" in name)
    del inside[gone]
    if form == "no index":
        del inside["model.safetensors.index.json"]
    with pytest.raises(anycard.FormatError, match=gone) as caught:
        anycard.read(HOLDERS["stored.zip"](tmp_path / "a.zip", inside))
    assert caught.value.path == str(tmp_path / "a.zip")


def test_an_index_names_nothing_outside(tmp_path: Path) -> None:
    """Neither files of the disk nor members of other folders."""
    for name in ("../other.safetensors", "/etc/passwd", "sub/../other.safetensors"):
        index = json.dumps({"weight_map": {"a": name}}).encode()
        inside = {"m/model.safetensors.index.json": index, "other.safetensors": b"x"}
        with pytest.raises(anycard.FormatError, match="no plain path"):
            anycard.read(HOLDERS["stored.zip"](tmp_path / "a.zip", inside), member="m/model.safetensors.index.json")


def test_bombs_of_several_members(tmp_path: Path) -> None:
    """What all members inflate to is bounded, not each alone."""
    shard = zeros(20 << 20)
    inside = {f"model-{n:05}-of-00005.safetensors": shard.replace(b'"t"', f'"{n}"'.encode()) for n in range(1, 6)}
    path = HOLDERS["deflated.zip"](tmp_path / "a.zip", inside)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.read(path)


def zeros(nbytes: int) -> bytes:
    """A safetensors file of zeros."""
    return save({"t": torch.zeros(nbytes, dtype=torch.uint8)})


def test_what_macos_puts_beside_files(tmp_path: Path) -> None:
    """Its files of attributes are called like shards, and are none."""
    folder = sharded(tmp_path / "m", WANT).parent
    (folder / "model.safetensors.index.json").unlink()
    inside = {**files_of(folder), **{f"__MACOSX/._{name}": b"\0\5\x16\7" for name in files_of(folder)}}
    assert_same(anycard.read(HOLDERS["stored.zip"](tmp_path / "a.zip", inside)), WANT)
    for name in files_of(folder):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    assert_same(anycard.read(folder), WANT)


def test_nothing_stays_open(tmp_path: Path) -> None:
    """What was inflated is closed with the checkpoint, or where it could not be opened."""
    inside = files_of(sharded(tmp_path / "m", WANT, safe=False).parent)
    path = HOLDERS["deflated.zip"](tmp_path / "a.zip", inside)
    last = next(name for name in reversed(inside) if "-of-" in name)
    bad = HOLDERS["deflated.zip"](tmp_path / "bad.zip", {**inside, last: inside[last][:-40]})
    before = set(Path("/proc/self/fd").iterdir())
    with anycard.open(path) as ckpt:
        assert ckpt.tensors
    with pytest.raises(anycard.FormatError):
        anycard.read(bad)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_model_of_shards_fills_a_wrapped_one(tmp_path: Path) -> None:
    """The whole way: archive, shards, wrapper."""
    inside = files_of(sharded(tmp_path / "m", WANT).parent, "m/")
    model = nn.DataParallel(filled(net(), 5))
    anycard.load(HOLDERS["gz.nemo"](tmp_path / "a.nemo", inside), model)
    assert_same(weights(model.module), WANT)
