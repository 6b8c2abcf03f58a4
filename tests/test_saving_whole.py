"""Whole models as we save them: what the file tells whoever has no classes, and the same bytes for the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, filled, weights


class Versioned(nn.Module):
    """Refuses files that say nothing of its version, as torchvision's mnasnet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"version is {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_whole_model_converts_to_what_saving_its_weights_gives(tmp_path, suffix):
    """The versions of its modules are in the file, wrapped or not: plain PyTorch loads what `convert` made of it."""
    model = filled(Versioned())
    anycard.save(model, tmp_path / f"weights{suffix}")
    for wrapped in (model, nn.DataParallel(model)):
        anycard.save(wrapped, tmp_path / "whole.pt", whole=True)
        anycard.convert(tmp_path / "whole.pt", tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"weights{suffix}").read_bytes()
    anycard.convert(tmp_path / "whole.pt", tmp_path / "b.pt")
    fresh = Versioned()
    fresh.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert_same(weights(fresh), weights(model))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("key", [None, "model"])
def test_a_whole_model_of_plain_torch_converts_to_what_loads(tmp_path, suffix, key):
    """Its versions are those of its classes, through one conversion and a second, from the top and from below a key."""
    model = filled(Versioned())
    torch.save(model if key is None else {"epoch": 3, "model": model}, tmp_path / "theirs.pt")
    paths = [tmp_path / name for name in ("theirs.pt", "all.pt", f"one{suffix}", "two.pt", f"three{suffix}")]
    anycard.convert(paths[0], paths[1])
    anycard.convert(paths[1], paths[2], key=key)
    anycard.convert(paths[2], paths[3])
    anycard.convert(paths[3], paths[4])
    for path in paths:
        assert_same(weights(anycard.load(path, Versioned)), weights(model))
