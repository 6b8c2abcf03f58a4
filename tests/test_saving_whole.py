"""Whole models as we save them: what the file tells whoever has no classes, and the same bytes for the same model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, filled, weights
from strategies import compiled


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


def test_compiling_a_model_leaves_nothing_in_the_file(tmp_path):
    """What `torch.compile` notes on the module that it wraps stays out: the same bytes before, compiled and after."""
    model = filled(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    anycard.save(model, tmp_path / "before.pt", whole=True)
    model[0] = compiled(model[0])
    around = compiled(model)
    anycard.save(around, tmp_path / "compiled.pt", whole=True)
    anycard.save(model, tmp_path / "after.pt", whole=True)
    assert len({(tmp_path / f"{name}.pt").read_bytes() for name in ("before", "compiled", "after")}) == 1
    assert model._is_torch_compile  # the model itself is not changed


def nested(depth: int) -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


def nested_list(depth: int) -> list[Any]:
    held: list[Any] = []
    for _ in range(depth):
        held = [held]
    return held


def test_what_is_nested_deeply_is_saved(tmp_path):
    """Modules and containers as deep as plain PyTorch takes them; the limit of the process is as it was."""
    model = filled(nested(150))
    model.held = nested_list(195)
    limit = sys.getrecursionlimit()
    anycard.save(model, tmp_path / "a.pt", whole=True)
    assert sys.getrecursionlimit() == limit
    theirs = torch.load(tmp_path / "a.pt", weights_only=False)
    assert_same(weights(theirs), weights(model))
    assert_same(anycard.read(tmp_path / "a.pt"), weights(model))
    assert theirs.held == model.held
    anycard.save({"held": model.held}, tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt", weights_only=True) == {"held": model.held}


def test_what_is_nested_too_deeply_is_named(tmp_path):
    """Beyond what is real: an error that says where, and the old file stays."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].held = nested_list(50_000)
    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(anycard.CheckpointError, match=r"0\.held is nested too deep"):
        anycard.save(model, tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").read_bytes() == b"old"


def test_two_parameters_on_one_memory_stay_two(tmp_path):
    """In their file as in PyTorch's an optimizer finds as many parameters as it had; one memory stays one."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.data)
    model[2].weight = model[0].weight
    anycard.save(model, tmp_path / "a.pt", whole=True)
    for loaded in (torch.load(tmp_path / "a.pt", weights_only=False), anycard.load(tmp_path / "a.pt")):
        assert len(list(loaded.parameters())) == len(list(model.parameters())) == 5
        assert loaded[2].weight is loaded[0].weight is not loaded[1].weight
        assert_same(weights(loaded), weights(model))
    theirs = torch.load(tmp_path / "a.pt", weights_only=False)
    assert theirs[0].weight.data_ptr() == theirs[1].weight.data_ptr()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_storage_that_a_model_keeps(tmp_path):
    """A typed one is in the memory of its tensors, the same bytes again; one without a type is refused by its path."""

    def build() -> nn.Module:
        model = filled(nn.Sequential(nn.Linear(2, 2)))
        model[0].head, model[0].steps = model[0].weight.data[1:], model[0].weight.data.storage()
        model[0].alone = torch.tensor([1, 2, 3], dtype=torch.int16).storage()
        return model

    for name in ("a.pt", "b.pt"):
        anycard.save(build(), tmp_path / name, whole=True)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    theirs, model = torch.load(tmp_path / "a.pt", weights_only=False), build()
    assert list(theirs[0].steps) == list(model[0].steps) and list(theirs[0].alone) == [1, 2, 3]
    assert theirs[0].steps.data_ptr() == theirs[0].weight.data_ptr()
    assert_same(anycard.read(tmp_path / "a.pt"), weights(model))
    model[0].raw = [torch.ones(3).untyped_storage()]
    with pytest.raises(anycard.CheckpointError, match=r"0\.raw: an UntypedStorage"):
        anycard.save(model, tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
