"""Wrappers: every one of them, every way round, around the whole model or around parts of it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anycard
from helpers import assert_same, assert_same_bits, filled, quiet, refused, weights
from strategies import WRAPPERS, Nested, OnlyModule, averaged, compiled, wrapped

STACKS = {"bare": [], **{name: [name] for name in WRAPPERS}, "deep": ["parallel", "compiled", "averaged"]}


class Pair(nn.Module):
    """Two networks, as a GAN has them; their inner parts are what people wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Nested()
        self.critic = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def inner_of(model: nn.Module) -> nn.Module:
    """The bare model within any of the wrappers here."""
    while True:
        for name in ("_orig_mod", "_checkpoint_wrapped_module"):
            if name in model._modules:
                model = model._modules[name]
                break
        else:
            if not isinstance(model, (nn.DataParallel, AveragedModel)):
                return model
            model = model.module


@pytest.mark.parametrize("source", STACKS)
@pytest.mark.parametrize("how", ["ours.pth", "ours.safetensors", "torch", "legacy"])
def test_every_wrapper_into_every_wrapper(tmp_path, source, how):
    """Saved in one wrapper, by us or by plain torch, the weights arrive in every other one."""
    model = wrapped(filled(Nested()), STACKS[source])
    want = weights(inner_of(model))
    path = tmp_path / ("model.safetensors" if how == "ours.safetensors" else "model.pth")
    if how in ("torch", "legacy"):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=how == "torch")
    else:
        anycard.save(model, path)
    for target in STACKS.values():
        other = wrapped(filled(Nested(), 5), target)
        anycard.load(path, other)
        assert_same(weights(inner_of(other)), want)
    assert_same(anycard.load(path, Nested).state_dict(), want)


@pytest.mark.parametrize("source", ["bare", "parallel", "compiled", "averaged"])
@pytest.mark.parametrize("target", ["bare", "parallel", "checkpointed", "averaged"])
@pytest.mark.parametrize("plain", [True, False])
def test_wrapping_only_an_inner_module(tmp_path, source, target, plain):
    """`self.generator = nn.DataParallel(...)`: names lose the inner segment, each side wraps as it likes."""
    model = filled(Pair())
    want = weights(model)
    model.generator = wrapped(model.generator, STACKS[source])
    if plain:
        torch.save(model.state_dict(), tmp_path / "gan.pth")
    else:
        anycard.save(model, tmp_path / "gan.pth")
    assert_same(anycard.load(tmp_path / "gan.pth", filled(Pair(), 5)).state_dict(), want)
    other = filled(Pair(), 5)
    other.generator = wrapped(other.generator, STACKS[target])
    anycard.load(tmp_path / "gan.pth", other)
    assert_same(weights(inner_of(other.generator)), {k[10:]: v for k, v in want.items() if k[:10] == "generator."})
    assert_same(weights(other.critic), {k[7:]: v for k, v in want.items() if k[:7] == "critic."})


@pytest.mark.parametrize("kind", [Nested, OnlyModule])
@pytest.mark.parametrize("stack", [["parallel"], ["parallel", "parallel"], ["compiled", "parallel"], ["averaged"]])
def test_a_real_submodule_called_module_keeps_its_name(tmp_path, kind, stack):
    """Only the wrapper's `module` goes; the model's own stays, in our files and in plain torch's."""
    model = filled(kind())
    want = weights(model)
    anycard.save(wrapped(model, stack), tmp_path / "ours.pth")
    assert list(torch.load(tmp_path / "ours.pth", weights_only=True)) == list(want)
    assert_same(anycard.read(tmp_path / "ours.pth"), want)
    torch.save(wrapped(model, stack).state_dict(), tmp_path / "theirs.pth")
    for path in (tmp_path / "ours.pth", tmp_path / "theirs.pth"):
        assert_same(anycard.load(path, kind).state_dict(), want)
        other = wrapped(filled(kind(), 5), ["parallel"])
        assert_same(anycard.load(path, other).module.state_dict(), want)


@pytest.mark.parametrize("inner", ["parallel", "compiled", "averaged"])
@pytest.mark.parametrize("outer", ["checkpointed", "offloaded"])
def test_wrappers_below_an_activation_wrapper_leave_no_segment(tmp_path, inner, outer):
    """An activation wrapper takes its own segment out of the state dict; what it wraps still loses its own."""
    model = filled(Pair())
    want = weights(model)
    model.generator = wrapped(model.generator, [inner])
    anycard.save(wrapped(model, [outer]), tmp_path / "ours.pth")
    assert_same(torch.load(tmp_path / "ours.pth", weights_only=True), want)
    assert_same(anycard.load(tmp_path / "ours.pth", Pair).state_dict(), want)


@pytest.mark.parametrize("inner", ["parallel", "compiled", "averaged"])
@pytest.mark.parametrize("outer", ["checkpointed", "offloaded"])
def test_loading_below_an_activation_wrapper(tmp_path, inner, outer):
    """A bare file fills a model whose activation wrapper holds another wrapper."""
    model = filled(Pair())
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    other = filled(Pair(), 5)
    other.generator = wrapped(other.generator, [inner])
    anycard.load(tmp_path / "bare.pth", wrapped(other, [outer]))
    assert_same(weights(inner_of(other.generator)), weights(model.generator))


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


def test_one_module_wrapped_and_bare_at_once_stays_one(tmp_path):
    """A model that holds a module both bare and in DataParallel has its weights once, tied."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.parallel = nn.DataParallel(self.net)

    source = filled(Both())
    anycard.save(source, tmp_path / "both.pth")
    names = {"net.weight", "net.bias", "parallel.weight", "parallel.bias"}
    assert set(anycard.read(tmp_path / "both.pth")) == names
    for target in (Both, filled(Both(), 5)):
        loaded = anycard.load(tmp_path / "both.pth", target)
        assert loaded.net is loaded.parallel.module
        assert_same_bits(loaded.net.weight, source.net.weight)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    assert_same_bits(anycard.load(tmp_path / "plain.pth", Both).net.weight, source.net.weight)


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


def test_subclasses_of_wrappers_are_wrappers(tmp_path):
    """People subclass DataParallel to pass attributes through; the names are the same."""

    class Transparent(nn.DataParallel):
        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.module, name)

    source = filled(Nested())
    anycard.save(Transparent(source), tmp_path / "a.pth")
    assert_same(anycard.read(tmp_path / "a.pth"), weights(source))
    other = Transparent(filled(Nested(), 5))
    anycard.load(tmp_path / "a.pth", other)
    assert_same(weights(nn.Module.__getattr__(other, "module")), weights(source))


def test_a_module_of_ones_own_with_a_child_called_module_is_no_wrapper(tmp_path):
    """A user's class that holds `self.module` keeps the segment; a bare file does not pretend to fit names away."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.extra = nn.Linear(2, 1)

    source = filled(Holder())
    anycard.save(source, tmp_path / "a.pth")
    assert "module.weight" in torch.load(tmp_path / "a.pth", weights_only=True)
    assert_same(anycard.load(tmp_path / "a.pth", nn.DataParallel(Holder())).module.state_dict(), weights(source))


def test_in_place_compile_adds_no_segment(tmp_path):
    """`model.compile()` wraps nothing: the file is the bare model's."""
    source = filled(Nested())
    anycard.save(source, tmp_path / "a.pth")
    source.compile()
    anycard.save(source, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_a_factory_may_wrap(tmp_path):
    """A factory that gives a wrapped model, even one inside and one outside, is filled."""
    source = filled(Pair())
    anycard.save(source, tmp_path / "a.pth")

    def factory() -> nn.Module:
        model = Pair()
        model.critic = checkpoint_wrapper(model.critic)
        return compiled(nn.DataParallel(model))

    loaded = anycard.load(tmp_path / "a.pth", factory)
    assert_same(weights(loaded._orig_mod.module.generator), weights(source.generator))
    assert_same(weights(loaded._orig_mod.module.critic), weights(source.critic))


@pytest.mark.parametrize("stack", [["parallel"], ["compiled"], ["compiled", "parallel"], ["averaged"]])
def test_whole_models_lose_wrappers_and_are_not_changed_by_it(tmp_path, stack):
    """whole=True writes the inner model; the saved object itself stays wrapped, weights as they were."""
    model = wrapped(filled(Pair()), stack)
    want = weights(inner_of(model))
    before = copy.deepcopy(list(model.state_dict()))
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    assert list(model.state_dict()) == before
    theirs = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert type(theirs) is Pair
    assert_same(theirs.state_dict(), want)
    rebuilt = anycard.load(tmp_path / "whole.pt", allow=[Pair.__module__, Nested.__module__])
    assert type(rebuilt) is Pair
    assert_same(rebuilt.state_dict(), want)
    assert_same(anycard.load(tmp_path / "whole.pt", nn.DataParallel(Pair())).module.state_dict(), want)


@pytest.mark.parametrize(
    "stack",
    [
        ["parallel"],
        ["compiled"],
        ["compiled", "parallel"],
        pytest.param(
            ["averaged"],
        ),
    ],
)
def test_whole_models_of_plain_torch_give_their_weights(tmp_path, stack):
    """torch.save of a wrapped module: its weights load by name into bare and wrapped models, nothing runs."""
    model = wrapped(filled(Pair()), stack)
    want = weights(inner_of(model))
    torch.save(model, tmp_path / "whole.pt")
    assert_same(anycard.read(tmp_path / "whole.pt"), want)
    assert_same(anycard.load(tmp_path / "whole.pt", Pair).state_dict(), want)
    assert_same(weights(anycard.load(tmp_path / "whole.pt", averaged(Pair())).module), want)


def test_a_refused_load_leaves_a_wrapped_model_alone(tmp_path):
    """What does not fit is named canonically, and neither weights nor counters change."""
    source = filled(Pair())
    del source.critic[1]
    anycard.save(averaged(source), tmp_path / "a.pth")
    other = AveragedModel(filled(Pair(), 5))
    other.n_averaged.fill_(2)
    refused(lambda: anycard.load(tmp_path / "a.pth", other), other, "critic.1.running_mean")


def test_safetensors_of_wrappers_are_plain(tmp_path):
    """The safetensors library reads bare names out of a file saved from wrappers."""
    source = filled(Pair())
    want = weights(source)
    source.critic = compiled(source.critic)
    anycard.save(nn.DataParallel(source), tmp_path / "a.safetensors")
    assert_same(load_file(tmp_path / "a.safetensors"), want)


def test_reading_without_a_model_drops_segments_and_says_so(tmp_path):
    """read of a plain file drops `module.` that all names carry, with a warning; canonical=False keeps it."""
    source = filled(Nested())
    torch.save(torch.compile(nn.DataParallel(source)).state_dict(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="module"):
        assert_same(anycard.read(tmp_path / "a.pth"), weights(source))
    with quiet():
        assert set(anycard.read(tmp_path / "a.pth", canonical=False)) == {
            f"_orig_mod.module.{n}" for n in weights(source)
        }
    with anycard.open(tmp_path / "a.pth") as ckpt:
        assert {"module", "_orig_mod"} <= set(ckpt.wrappers)


def test_an_unwrapped_sibling_keeps_every_name(tmp_path):
    """Where one name lacks `module.`, without a model it stays on all."""
    state = {"module.a.weight": torch.ones(2), "other.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "a.pth")
    assert_same(anycard.read(tmp_path / "a.pth"), state)


def test_versions_are_kept_under_canonical_names(tmp_path):
    """`_metadata` of a wrapped model's file has the bare model's keys, so that old rules apply to the right module."""
    anycard.save(filled(Nested()), tmp_path / "a.pth")
    model = filled(Nested())
    model.block = nn.DataParallel(model.block)
    anycard.save(compiled(model), tmp_path / "b.pth")
    one, two = (torch.load(tmp_path / name, weights_only=True)._metadata for name in ("a.pth", "b.pth"))
    assert one == two == Nested().state_dict()._metadata
