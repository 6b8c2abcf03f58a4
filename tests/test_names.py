"""Stored names that are not the model's: wrapper segments, averages beside the weights, renames."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import anycard
from helpers import Small, assert_same, assert_same_bits, filled, quiet, refused, told, unchanged, weights

SEGMENTED = {
    "stem": "_forward_module.stem._orig_mod",
    "norm": "_forward_module._fsdp_wrapped_module.norm._checkpoint_wrapped_module._fsdp_wrapped_module",
    "head": "_forward_module._orig_mod.head",
}


@pytest.mark.parametrize("write", [torch.save, save_file], ids=["zip", "safetensors"])
def test_segments_anywhere_in_names(tmp_path, write):
    """Four kinds of wrapper segments at several depths, each name in its own way, fit bare and wrapped models."""
    source = filled(Small())
    state = {f"{SEGMENTED[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in weights(source).items()}
    write(state, tmp_path / "a")
    assert_same(anycard.read(tmp_path / "a"), weights(source))
    other = filled(Small(), 5)
    other.norm = torch.compile(nn.DataParallel(other.norm))
    anycard.load(tmp_path / "a", other)
    assert_same(weights(other.norm._orig_mod.module), weights(source.norm))
    assert_same(weights(anycard.load(tmp_path / "a", Small)), weights(source))


def test_averages_without_dots_are_never_taken_for_the_weights(tmp_path):
    """Latent diffusion's LitEma: `model_ema.stemweight` beside `model.stem.weight`; named, and left out if asked."""
    source, average = filled(Small(), 1), filled(Small(), 2)
    state = {f"model.{k}": v for k, v in weights(source).items()}
    state |= {f"model_ema.{k.replace('.', '')}": v for k, v in weights(average).items()}
    state |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    torch.save({"state_dict": state, "global_step": 4}, tmp_path / "a.ckpt")
    model = filled(Small(), 5)
    refused(lambda: anycard.load(tmp_path / "a.ckpt", model), model, "model_ema.stemweight")
    told(lambda: anycard.load(tmp_path / "a.ckpt", model, strict=False), "model_ema.stemweight")
    assert_same(weights(model), weights(source))


@pytest.mark.parametrize("name", ["{}_ema", "shadow.{}", "{}_avg", "ema_{}"])
def test_twin_names_in_one_state_dict(tmp_path, name):
    """Averages beside the weights under names of another make: unexpected by name, the weights proper load."""
    source, average = filled(Small(), 1), filled(Small(), 2)
    state = weights(source) | {name.format(k.replace(".", "_")): v for k, v in weights(average).items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    model = filled(Small(), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, name.format("stem_weight"))
    with quiet():
        assert_same(weights(anycard.load(tmp_path / "a.pth", model, strict=False)), weights(source))


def test_twin_names_with_dots(tmp_path):
    """`ema.stem.weight` beside `stem.weight`: the plain names are the model's, the others are unexpected."""
    source, average = filled(Small(), 1), filled(Small(), 2)
    torch.save(weights(source) | {f"ema.{k}": v for k, v in weights(average).items()}, tmp_path / "a.pth")
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError, match="ema"):
        anycard.load(tmp_path / "a.pth", model)
    with quiet():
        assert_same(weights(anycard.load(tmp_path / "a.pth", model, key="ema")), weights(average))


def test_integer_keys_are_names(tmp_path):
    """A dict of ints to tensors, as some people number their layers, is read under the numbers."""
    torch.save({0: torch.zeros(2), 1: torch.ones(2)}, tmp_path / "a.pt")
    assert_same(anycard.read(tmp_path / "a.pt"), {"0": torch.zeros(2), "1": torch.ones(2)})


def test_renames_that_only_change_a_middle_part(tmp_path):
    """An adapter's name within names: the refusal shows both, a regex or a mapping mends it."""
    model = nn.ModuleDict({"q": nn.ModuleDict({"A": nn.ModuleDict({"style": nn.Linear(2, 2, bias=False)})})})
    torch.save({"q.A.weight": torch.rand(2, 2)}, tmp_path / "a.bin")
    want = torch.load(tmp_path / "a.bin")["q.A.weight"]
    refused(lambda: anycard.load(tmp_path / "a.bin", model), model, "q.A.weight", "q.A.style.weight")
    for rename in ([(r"\.A\.", ".A.style.")], {"q.A": "q.A.style"}, {"q.A.weight": "q.A.style.weight"}):
        filled(model, 5)
        anycard.load(tmp_path / "a.bin", model, rename=rename)
        assert_same_bits(model["q"]["A"]["style"].weight, nn.Parameter(want))


def test_a_rename_that_makes_two_names_one_is_refused(tmp_path):
    """Two stored names under one, also with strict=False: refused, nothing changes."""
    torch.save({"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}, tmp_path / "a.pth")
    model = filled(nn.ModuleDict({"c": nn.Linear(2, 2, bias=False)}), 5)
    for strict in (True, False):
        with unchanged(model), pytest.raises(anycard.CheckpointError):
            anycard.load(tmp_path / "a.pth", model, rename=[("^[ab]", "c")], strict=strict)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "rename", [{"foot": "stem"}, {"foot.": "stem."}, [("^foot", "stem")], lambda n: n.replace("foot", "stem")]
)
def test_renames_work_on_canonical_names(tmp_path, prefix, rename):
    """A rename need not know how the file's model was wrapped, nor how this one is."""
    source = filled(Small())
    torch.save({prefix + k.replace("stem", "foot"): v for k, v in weights(source).items()}, tmp_path / "a.pth")
    assert_same(weights(anycard.load(tmp_path / "a.pth", Small, rename=rename)), weights(source))
    parallel = anycard.load(tmp_path / "a.pth", nn.DataParallel(Small()), rename=rename)
    assert_same(weights(parallel.module), weights(source))


@pytest.mark.parametrize("write", ["ours", "plain", "compiled", "whole"])
def test_diff_and_fingerprint_do_not_see_wrappers(tmp_path, write):
    """The same weights, however wrapped and in whatever file, are equal and have one fingerprint."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.safetensors")
    path = tmp_path / "b.pth"
    if write == "ours":
        anycard.save(nn.DataParallel(source), path)
    elif write == "plain":
        torch.save(nn.DataParallel(source).state_dict(), path)
    elif write == "compiled":
        torch.save({"state_dict": torch.compile(source).state_dict()}, path)
    else:
        torch.save(nn.DataParallel(source), path)
    with quiet():
        assert anycard.diff(tmp_path / "a.safetensors", path).equal
        with anycard.open(tmp_path / "a.safetensors") as one, anycard.open(path) as two:
            assert one.fingerprint() == two.fingerprint()
