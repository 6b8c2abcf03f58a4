"""Files as others write them: any suffix, tags of absent cards, arrays, other things beside the weights."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import anycard
from helpers import Small, assert_same, assert_same_bits, both, filled, tagged, weights


def test_the_content_tells_the_format_not_the_suffix(tmp_path):
    """safetensors called .pt, a legacy stream called .safetensors, a zip without any suffix."""
    source = filled(Small())
    save_file(weights(source), tmp_path / "a.pt")
    torch.save(source.state_dict(), tmp_path / "b.safetensors", _use_new_zipfile_serialization=False)
    torch.save(source.state_dict(), tmp_path / "checkpoint")
    for name, kind in (("a.pt", "safetensors"), ("b.safetensors", "legacy"), ("checkpoint", "zip")):
        assert_same(weights(anycard.load(tmp_path / name, Small)), weights(source))
        with anycard.open(tmp_path / name) as ckpt:
            assert kind in ckpt.format


@pytest.mark.parametrize(
    "tag", ["xla:1", "npu:0", "cuda:7", "cuda:0", "mps:0", "vulkan", "hpu", "cuda", "ipu:3", "lazy:0"]
)
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_tags_of_absent_backends_do_not_matter(tmp_path, tag, legacy, whole):
    """A file from any card of any make loads with no argument, weights and whole models, and says the tag."""
    source = filled(Small())
    with tagged(tag):
        torch.save(
            source if whole else source.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy
        )
    for target in both(Small):
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert_same(weights(loaded), weights(source))
        assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    assert_same(anycard.read(tmp_path / "a.pth"), weights(source))
    with anycard.open(tmp_path / "a.pth") as ckpt:
        assert {info.device for info in ckpt.tensors.values()} == {tag}


@pytest.mark.parametrize("write", ["zip", "legacy", "plain dict"])
def test_arrays_for_tensors(tmp_path, write):
    """numpy arrays of many dtypes and orders, big-endian ones too, are tensors to read and to load."""
    source = filled(Small())
    state: dict[str, Any] = {k: v.numpy() for k, v in weights(source).items()}
    state["stem.weight"] = np.asfortranarray(state["stem.weight"])
    state["stem.bias"] = state["stem.bias"].astype(">f4")
    state["head.weight"] = np.repeat(state["head.weight"], 2, axis=1)[:, ::2]
    tree = {"best": np.float32(0.5), "state_dict": state} if write == "plain dict" else state
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=write != "legacy")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.pth", target)), weights(source))


def test_arrays_saved_by_us(tmp_path):
    """A dict of arrays is saved as tensors, which plain torch reads."""
    anycard.save({"a": np.arange(6, dtype=np.float64).reshape(2, 3).T, "n": np.float32(0.25)}, tmp_path / "a.pth")
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    assert_same_bits(theirs["a"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T)
    assert theirs["n"] == 0.25


@pytest.mark.parametrize(
    "beside",
    [
        {"best": np.float64(0.5), "scores": np.arange(3)},
        {"rng": np.random.RandomState(0).get_state()},
        {"args": argparse.Namespace(lr=0.1), "when": __import__("datetime").datetime(2020, 1, 1)},
        {"path": __import__("pathlib").PurePosixPath("/data")},
        {"fn": torch.nn.functional.relu, "kind": torch.float16, "device": torch.device("cuda", 3)},
        {"range": range(3), "slice": slice(1, 2), "set": {1, 2}, "frozen": frozenset("ab"), "big": 2**200},
    ],
    ids=["numpy scalars", "random state", "arguments", "path", "torch's own", "builtins"],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [True, False])
def test_other_things_beside_the_weights(tmp_path, beside, legacy):
    """Scores, arguments, dates and the like beside the weights are data, and nobody needs to trust them."""
    source = filled(Small())
    torch.save({"model": source.state_dict(), **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.pth", target)), weights(source))
    assert_same(anycard.read(tmp_path / "a.pth"), weights(source))
