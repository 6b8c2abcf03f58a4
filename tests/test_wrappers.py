"""Wrappers: every one of them, every way round, around the whole model or around parts of it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import anycard
from helpers import assert_same, assert_same_bits, filled, quiet, refused, weights
from strategies import WRAPPERS, Nested, OnlyModule, Pair, averaged, compiled, wrapped

STACKS = {"bare": [], **{name: [name] for name in WRAPPERS}, "deep": ["parallel", "compiled", "averaged"]}


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


class WithHead(nn.DataParallel):
    """A wrapper that has more than what it wraps."""

    def __init__(self, module: nn.Module, **own: object) -> None:
        super().__init__(module)
        for name, value in own.items():
            setattr(self, name, value)


@pytest.mark.parametrize("own", [nn.Linear(2, 2), nn.Parameter(torch.ones(2)), nn.Buffer(torch.ones(2)), nn.ReLU()])
@pytest.mark.parametrize("outer", [lambda m: m, AveragedModel, lambda m: nn.Sequential(nn.ReLU(), m)])
def test_a_wrapper_with_more_than_what_it_wraps_is_no_whole_model(tmp_path, own, outer):
    """What would be lost is named, with what to do; a second name of what is inside, and plain attributes, are not."""
    inner = nn.Sequential(nn.Linear(2, 2))
    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(anycard.CheckpointError, match=r"WithHead.*head of its own.*weights"):
        anycard.save(outer(WithHead(inner, head=own)), tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    anycard.save(outer(WithHead(inner, again=inner[0], scale=2)), tmp_path / "a.pt", whole=True)
    assert len(anycard.read(tmp_path / "a.pt")) == 2


class Adapted(nn.Module):
    """Stores its adapter alone, under a name of its own."""

    def __init__(self, by_hook: bool) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(2, 2), nn.Linear(2, 2)
        if by_hook:
            self._register_state_dict_hook(lambda module, state, prefix, metadata: self.chosen(state))
        self.by_hook = by_hook

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        state = super().state_dict(*args, **kwargs)
        return state if self.by_hook else self.chosen(state)

    def chosen(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("adapter", "lora"): tensor for name, tensor in state.items() if "adapter" in name}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("by_hook", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_is_asked_for_its_own_state_dict_in_any_wrapper(tmp_path, stack, by_hook, suffix):
    """What a model itself stores, by a method or by a hook, is stored however it is wrapped: the same bytes."""
    model = filled(Adapted(by_hook))
    anycard.save(model, tmp_path / f"a{suffix}")
    model = wrapped(model, STACKS[stack])
    anycard.save(model, tmp_path / f"b{suffix}")
    assert_same(anycard.read(tmp_path / f"b{suffix}"), inner_of(model).state_dict())
    assert sorted(anycard.read(tmp_path / f"b{suffix}")) == ["lora.bias", "lora.weight"]
    if "averaged" not in STACKS[stack]:  # which counts, and copies what it wraps
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("more", ["parameter", "hook", "method"])
def test_a_wrapper_that_stores_more_is_asked_itself(tmp_path, more):
    """A parameter, a state-dict hook or a `state_dict` of the wrapper's own is in the file."""

    class Telling(nn.DataParallel):
        def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
            return {**super().state_dict(*args, **kwargs), "scale": torch.ones(2)}

    model = (Telling if more == "method" else nn.DataParallel)(nn.Linear(2, 2))
    if more == "parameter":
        model.scale = nn.Parameter(torch.ones(2))
    if more == "hook":
        model._register_state_dict_hook(lambda module, state, prefix, metadata: state.update(scale=torch.ones(2)))
    anycard.save(nn.DataParallel(model), tmp_path / "a.pth")
    assert_same(anycard.read(tmp_path / "a.pth"), {**model.module.state_dict(), "scale": torch.ones(2)})
