"""Checkpoints in several files: Hugging Face's shards, with their index and without; folders of single files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

import anycard
from anycard import ChoiceError
from anycard.operations.fingerprinting import fingerprint
from helpers import assert_same, bits, filled, unchanged, weights


def net() -> nn.Sequential:
    """A model whose weights take several shards."""
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16), nn.Linear(16, 4))


def sharded(folder: Path, want: dict[str, torch.Tensor], safe: bool = True) -> Path:
    """The weights as huggingface_hub writes them, in at least three shards; gives the index."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(dict(want), folder, max_shard_size=3_000, safe_serialization=safe)
    index = next(folder.glob("*.index.json"))
    assert len(list(folder.glob("*-of-*"))) >= 3
    return index


@pytest.fixture(params=[True, False], ids=["safetensors", "torch"])
def safe(request: pytest.FixtureRequest) -> bool:
    """The shards' format."""
    return bool(request.param)


def test_folder_and_index_give_the_weights(tmp_path: Path, safe: bool) -> None:
    """Both names of the same thing; all bits, and into a model."""
    want = weights(filled(net()))
    index = sharded(tmp_path / "m", want, safe)
    for path in (tmp_path / "m", index, str(index), str(tmp_path / "m") + "/"):
        assert_same(anycard.read(path), want)
    model = filled(net(), 3)
    assert anycard.load(tmp_path / "m", model) is model
    assert_same(weights(model), want)
    assert_same(weights(anycard.load(index, net)), want)
    with anycard.open(tmp_path / "m") as ckpt:
        assert ckpt.format == ("sharded safetensors" if safe else "sharded torch")
        assert {i.file for i in ckpt.tensors.values()} == {str(p) for p in (tmp_path / "m").glob("*-of-*")}
        assert list(ckpt.weights()) == list(json.loads(index.read_text())["weight_map"])
        assert ckpt.metadata["total_size"] == sum(t.nbytes for t in want.values())
        assert bits(torch.from_numpy(ckpt.numpy("0.weight"))) == bits(want["0.weight"])


def test_relative_index_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool) -> None:
    """The index's own folder is found where its path has none."""
    want = weights(filled(net()))
    index = sharded(tmp_path, want, safe)
    monkeypatch.chdir(tmp_path)
    assert_same(anycard.read(index.name), want)
    assert_same(anycard.read("."), want)


def test_operations_on_a_folder(tmp_path: Path, safe: bool) -> None:
    """convert, diff, fingerprint, verify and the command line take it as a file."""
    want = weights(filled(net()))
    folder = sharded(tmp_path / "m", want, safe).parent
    torch.save(want, tmp_path / "one.pt")
    assert fingerprint(folder) == fingerprint(tmp_path / "one.pt")
    assert anycard.diff(folder, tmp_path / "one.pt").equal
    report = anycard.verify(folder)
    assert report.ok and (report.checked == 0 if safe else report.checked == len(want))
    for name in ("out.safetensors", "out.pth"):
        anycard.convert(folder, tmp_path / name)
        assert_same(anycard.read(tmp_path / name), want)
    shown = subprocess.run(
        [sys.executable, "-m", "anycard", "show", "--json", str(folder)], check=True, capture_output=True, text=True
    ).stdout
    assert set(json.loads(shown)["tensors"]) == set(want)


def test_damage_in_a_torch_shard_is_found(tmp_path: Path) -> None:
    """verify names the tensor; a load that checks refuses."""
    want = weights(filled(net()))
    folder = sharded(tmp_path / "m", want, safe=False).parent
    with anycard.open(folder) as ckpt:
        info = ckpt.tensors["0.weight"]
        file, at = str(info.file), info.offset
    data = bytearray(Path(file).read_bytes())
    data[at] ^= 1
    Path(file).write_bytes(data)
    assert anycard.verify(folder).damaged == ("0.weight",)
    model = filled(net(), 3)
    with unchanged(model), pytest.raises(anycard.FormatError, match=r"0\.weight"):
        anycard.load(folder, model, verify=True)


def test_tied_names_of_an_index(tmp_path: Path) -> None:
    """huggingface_hub keeps the second name of a tied tensor in the index's metadata."""
    want = weights(filled(net()))
    want["tied"] = want["0.weight"]
    index = sharded(tmp_path / "m", want)
    assert (
        "tied" in json.loads(index.read_text())["metadata"] or "0.weight" in json.loads(index.read_text())["metadata"]
    )
    got = anycard.read(index)
    assert_same(got, want)
    assert got["tied"].data_ptr() == got["0.weight"].data_ptr()


def _without(folder: Path, pattern: str) -> str:
    gone = sorted(folder.glob(pattern))[1]
    gone.unlink()
    return gone.name


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no index"])
def test_missing_shard_is_named(tmp_path: Path, safe: bool, with_index: bool) -> None:
    """Before anything is loaded."""
    index = sharded(tmp_path / "m", weights(filled(net())), safe)
    gone = _without(index.parent, "*-of-*")
    if not with_index:
        index.unlink()
    model = filled(net(), 5)
    with unchanged(model), pytest.raises(anycard.FormatError, match=gone):
        anycard.load(tmp_path / "m", model)


def test_shards_without_an_index(tmp_path: Path, safe: bool) -> None:
    """The numbers in their names say whether all are there."""
    want = weights(filled(net()))
    sharded(tmp_path / "m", want, safe).unlink()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert_same(anycard.read(tmp_path / "m"), want)


def test_two_sets_of_shards_are_a_choice(tmp_path: Path) -> None:
    """Each can be picked by the name that the error gives it."""
    want, other = weights(filled(net())), weights(filled(net(), 2))
    sharded(tmp_path / "m", want).unlink()
    sharded(tmp_path / "n", other).unlink()
    for file in (tmp_path / "n").iterdir():
        shutil.copy(file, tmp_path / "m" / file.name.replace("model", "ema"))
    with pytest.raises(ChoiceError, match=r"ema-\*-of-") as caught:
        anycard.read(tmp_path / "m")
    label = next(part for part in str(caught.value).split("'") if part.startswith("ema-"))
    assert_same(anycard.read(tmp_path / "m", member=label), other)


def test_stale_index_names_what_is_absent(tmp_path: Path, safe: bool) -> None:
    """A tensor that its shard does not hold; and a shard of another model."""
    index = sharded(tmp_path / "m", weights(filled(net())), safe)
    held = json.loads(index.read_text())
    held["weight_map"]["head.weight"] = next(iter(held["weight_map"].values()))
    index.write_text(json.dumps(held))
    model = filled(net(), 5)
    with unchanged(model), pytest.raises(anycard.FormatError, match=r"stale.*head\.weight"):
        anycard.load(index, model)


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    """The index decides; without one it is an error."""
    tmp_path.joinpath("m").mkdir()
    one, two = {"a": torch.ones(3), "b": torch.zeros(2)}, {"a": torch.full((3,), 7.0)}
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, held in zip(files, (one, two), strict=True):
        save_file(held, tmp_path / "m" / file)
    with pytest.raises(anycard.FormatError, match="several shards"):
        anycard.read(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": files[1], "b": files[0]}}))
    assert_same(anycard.read(tmp_path / "m"), {"a": two["a"], "b": one["b"]})


OUTSIDE = ["../x.safetensors", "/etc/hostname", "a/../../x.safetensors", "..\\x", "", ".", "a//b", "x\0y", "n" * 5000]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_index_that_names_files_elsewhere(tmp_path: Path, name: str) -> None:
    """Plain relative paths below its own folder only."""
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(anycard.FormatError, match="no plain path"):
        anycard.read(folder)


BROKEN: list[Any] = [
    b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b"{\xff}", b'{"weight_map": {"a": "m"}}',
    b'{"a":' * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_broken_index(tmp_path: Path, data: bytes) -> None:
    """Malformed is FormatError, with the file."""
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with pytest.raises(anycard.FormatError, match=r"index\.json"):
            anycard.read(path)


def test_a_pipe_in_place_of_a_shard(tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pipe.safetensors"}}')
    with pytest.raises(anycard.FormatError, match=r"pipe\.safetensors"):
        anycard.read(tmp_path)


def test_symlinked_shards_are_followed(tmp_path: Path) -> None:
    """Hugging Face's caches are made of them."""
    want = weights(filled(net()))
    sharded(tmp_path / "blobs", want)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert_same(anycard.read(tmp_path / "snapshot"), want)


def test_an_index_in_an_open_file_asks_for_the_path(tmp_path: Path) -> None:
    """It has no folder."""
    index = sharded(tmp_path / "m", weights(filled(net())))
    with index.open("rb") as file, pytest.raises(anycard.FormatError, match="give its path"):
        anycard.read(file)


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "model.safetensors": save_file, "pytorch_model.bin": torch.save, "last.ckpt": torch.save, "net.pth": torch.save,
}  # fmt: skip


@pytest.mark.parametrize("name", SAVERS)
def test_folder_with_one_checkpoint(tmp_path: Path, name: str) -> None:
    """What lies beside it is told from weights by its name."""
    want = weights(filled(net()))
    SAVERS[name](want, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    torch.save(torch.get_rng_state(), tmp_path / "rng_state_0.pth")
    assert_same(anycard.read(tmp_path), want)
    (tmp_path / "outer").mkdir()
    shutil.move(tmp_path / name, tmp_path / "outer" / name)
    assert_same(anycard.read(tmp_path / "outer"), want)


def test_one_checkpoint_in_a_folder_of_the_folder(tmp_path: Path, safe: bool) -> None:
    """A run's folder with one checkpoint folder in it; two are a choice."""
    want, other = weights(filled(net())), weights(filled(net(), 1))
    sharded(tmp_path / "checkpoint-500", want, safe)
    assert_same(anycard.read(tmp_path), want)
    sharded(tmp_path / "checkpoint-900", other, safe)
    with pytest.raises(ChoiceError, match="checkpoint-900"):
        anycard.read(tmp_path)
    assert_same(anycard.read(tmp_path, member="checkpoint-900"), other)


def test_several_unrelated_files_are_a_choice(tmp_path: Path) -> None:
    """All are listed; `member` opens one, also one that was not listed."""
    first, second = weights(filled(net())), weights(filled(net(), 1))
    torch.save(first, tmp_path / "a.pth")
    torch.save(second, tmp_path / "b.pth")
    torch.save({"x": torch.ones(2)}, tmp_path / "notes.dat")
    with pytest.raises(ChoiceError, match=r"'a\.pth', 'b\.pth'"):
        anycard.read(tmp_path)
    assert_same(anycard.read(tmp_path, member="b.pth"), second)
    assert_same(anycard.read(tmp_path, member="notes.dat"), {"x": torch.ones(2)})
    assert_same(weights(anycard.load(tmp_path, net, member="a.pth")), first)
    assert fingerprint(tmp_path, member="a.pth") == fingerprint(tmp_path / "a.pth")
    for wrong in ("c.pth", "../a.pth", "/a.pth"):
        with pytest.raises(ChoiceError, match=r"a\.pth"):
            anycard.read(tmp_path, member=wrong)


def test_weights_of_transformers_in_both_formats(tmp_path: Path) -> None:
    """safetensors is what transformers takes; the other one can be picked."""
    first, second = weights(filled(net())), weights(filled(net(), 1))
    save_file(first, tmp_path / "model.safetensors")
    torch.save(second, tmp_path / "pytorch_model.bin")
    assert_same(anycard.read(tmp_path), first)
    assert_same(anycard.read(tmp_path, member="pytorch_model.bin"), second)


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    """The error says what is there."""
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(anycard.FormatError, match=r"README\.md"):
        anycard.read(tmp_path)


def test_member_of_a_single_file(tmp_path: Path) -> None:
    """Nothing to pick from."""
    torch.save(weights(net()), tmp_path / "a.pth")
    with pytest.raises(ChoiceError, match="member="):
        anycard.read(tmp_path / "a.pth", member="x")


@pytest.mark.parametrize("kind", ["model.safetensors.index.fp16.json", "pytorch_model.bin.index.ema.json"])
def test_the_index_of_a_variant(tmp_path: Path, kind: str) -> None:
    """As diffusers and transformers call it: the index leads to its shards."""
    want = weights(filled(net()))
    stem, suffix, _, variant, _ = kind.split(".")
    names = {}
    for number, (name, tensor) in enumerate(want.items(), 1):
        names[name] = f"{stem}.{variant}-{number:05}-of-{len(want):05}.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)({name: tensor}, tmp_path / names[name])
    (tmp_path / kind).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert_same(anycard.read(tmp_path / kind), want)
    assert_same(anycard.read(tmp_path), want)
