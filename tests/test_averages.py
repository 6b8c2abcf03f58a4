"""Averages of a model: their counters and names, in files of ours and of plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anycard
from helpers import assert_same, assert_same_bits, filled, weights
from strategies import Nested, Pair, averaged


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_average_counter_is_kept_and_restored(tmp_path, suffix):
    """n_averaged goes out with our file, is no weight of it, and comes back into an AveragedModel."""
    model = averaged(filled(Nested()))
    anycard.save(model, tmp_path / f"swa{suffix}")
    assert "n_averaged" not in anycard.read(tmp_path / f"swa{suffix}")
    other = AveragedModel(filled(Nested(), 5))
    anycard.load(tmp_path / f"swa{suffix}", other)
    assert int(other.n_averaged) == 7
    deeper = torch.compile(nn.DataParallel(AveragedModel(filled(Nested(), 5))))
    anycard.load(tmp_path / f"swa{suffix}", deeper)
    assert int(deeper._orig_mod.module.n_averaged) == 7
    assert_same(anycard.load(tmp_path / f"swa{suffix}", Nested).state_dict(), weights(model.module))


def test_the_average_counter_survives_a_conversion(tmp_path):
    """convert carries n_averaged between the formats."""
    anycard.save(averaged(filled(Nested())), tmp_path / "a.pth")
    anycard.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    anycard.convert(tmp_path / "b.safetensors", tmp_path / "c.pth")
    other = AveragedModel(filled(Nested(), 5))
    assert int(anycard.load(tmp_path / "c.pth", other).n_averaged) == 7


@pytest.mark.parametrize("plain", [True, False])
def test_the_next_average_does_not_overwrite_weights_from_a_bare_file(tmp_path, plain):
    """A file without n_averaged sets it, said in the plan: update_parameters averages, it does not replace."""
    source = filled(Nested())
    torch.save(source.state_dict(), tmp_path / "bare.pth") if plain else anycard.save(source, tmp_path / "bare.pth")
    other = AveragedModel(filled(Nested(), 5))
    assert "n_averaged" in str(anycard.plan(tmp_path / "bare.pth", other))
    anycard.load(tmp_path / "bare.pth", other)
    assert int(other.n_averaged) > 0
    other.update_parameters(filled(Nested(), 5))
    assert not torch.equal(other.module.head.weight, filled(Nested(), 5).head.weight)


@pytest.mark.parametrize("plain", [True, False])
def test_two_averages_keep_their_own_counters(tmp_path, plain):
    """A model with two AveragedModels inside gets each one's counter back, not one for both."""

    def build(one: int, two: int, seed: int) -> nn.Module:
        model = filled(Pair(), seed)
        model.generator, model.critic = AveragedModel(model.generator), AveragedModel(model.critic)
        model.generator.n_averaged.fill_(one)
        model.critic.n_averaged.fill_(two)
        return model

    source = build(3, 11, 0)
    path = tmp_path / "two.pth"
    torch.save(source.state_dict(), path) if plain else anycard.save(source, path)
    other = anycard.load(path, build(0, 0, 5))
    assert (int(other.generator.n_averaged), int(other.critic.n_averaged)) == (3, 11)


def test_two_averages_in_a_dict_keep_their_own_counters(tmp_path):
    """In a dict of objects each AveragedModel has its own counter."""
    one, two = averaged(filled(Nested())), averaged(filled(Nested(), 1))
    one.n_averaged.fill_(3)
    anycard.save({"one": one, "two": two}, tmp_path / "two.ckpt")
    first, second = AveragedModel(Nested()), AveragedModel(Nested())
    anycard.load(tmp_path / "two.ckpt", {"one": first, "two": second})
    assert (int(first.n_averaged), int(second.n_averaged)) == (3, 7)
    assert_same(weights(second.module), weights(two.module))


def test_a_model_and_its_average_in_one_dict(tmp_path):
    """The running model and its average come back each into its own, bare or wrapped."""
    model = filled(Nested())
    ema = AveragedModel(filled(Nested(), 1), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    ema.n_averaged.fill_(4)
    anycard.save({"model": nn.DataParallel(model), "ema": ema, "step": 9}, tmp_path / "run.ckpt")
    fresh = AveragedModel(Nested(), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    bare = Nested()
    state = anycard.load(tmp_path / "run.ckpt", {"model": bare, "ema": fresh})
    assert state["step"] == 9
    assert int(fresh.n_averaged) == 4
    assert_same(bare.state_dict(), weights(model))
    assert_same(fresh.module.state_dict(), weights(ema.module))
    assert_same(anycard.load(tmp_path / "run.ckpt", Nested, key="ema").state_dict(), weights(ema.module))


def test_a_buffer_that_is_really_called_n_averaged_is_kept(tmp_path):
    """A model's own buffer of that name is the model's, not a wrapper's."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("n_averaged", torch.tensor(5))

    source = Counting()
    source.n_averaged.fill_(8)
    anycard.save(nn.DataParallel(source), tmp_path / "own.pth")
    torch.save(nn.DataParallel(source).state_dict(), tmp_path / "theirs.pth")
    assert int(torch.load(tmp_path / "own.pth", weights_only=True)["n_averaged"]) == 8
    for name in ("own.pth", "theirs.pth"):
        assert int(anycard.load(tmp_path / name, Counting).n_averaged) == 8
        assert int(anycard.load(tmp_path / name, nn.DataParallel(Counting())).module.n_averaged) == 8


def test_one_average_under_two_names(tmp_path):
    """An AveragedModel that two attributes share leaves no counter among the weights."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = AveragedModel(nn.Linear(2, 2))
            self.b = self.a

    source = filled(Shared())
    anycard.save(source, tmp_path / "shared.pth")
    assert set(anycard.read(tmp_path / "shared.pth")) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    loaded = anycard.load(tmp_path / "shared.pth", Shared)
    assert_same_bits(loaded.b.module.weight, source.a.module.weight)


@pytest.mark.parametrize("target", ["b.pt", "b.safetensors"])
@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("how", ["ours", "theirs", "whole"])
def test_the_average_counter_within_a_checkpoint_survives_a_conversion(tmp_path, how, key, target):
    """Whether all goes over or one state dict does, from either writer, or as a module among objects."""
    source = averaged(filled(Nested()))
    if how == "ours":
        anycard.save({"model": source, "epoch": 3}, tmp_path / "a.ckpt")
    else:
        held = source if how == "whole" else source.state_dict()
        torch.save({"model": held, "epoch": 3}, tmp_path / "a.ckpt")
    anycard.convert(tmp_path / "a.ckpt", tmp_path / target, key=key)
    other = AveragedModel(filled(Nested(), 5))
    assert int(anycard.load(tmp_path / target, other).n_averaged) == 7
    assert_same(weights(other.module), weights(source.module))
