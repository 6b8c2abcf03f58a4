"""Modules that load themselves, and files from elsewhere: the kinds behind public bug reports, made anew."""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import io
import pickle
import random
import subprocess
import sys
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import anycard
from helpers import (
    assert_same,
    assert_same_bits,
    everything,
    filled,
    quiet,
    refused,
    tagged,
    told,
    unchanged,
    weights,
)


class Small(nn.Module):
    """Weights, float and integer buffers."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)


def both(build: Any) -> list[Any]:
    """The two ways to give a model: a factory, and one that is there."""
    return [build, filled(build(), 5)]


def agrees_with_torch(build: Any, state: dict[str, Any], path: Any) -> None:
    """anycard gives a module that loads itself the very tensors that load_state_dict gives it."""
    torch.save(state, path)
    theirs = filled(build(), 5)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    for target in both(lambda: filled(build(), 5)):
        assert_same(everything(anycard.load(path, target)), everything(theirs))


# -- modules that load themselves ---------------------------------------------------------------


class Renaming(nn.Module):
    """Old files call its layer `dense`; translated by the private hook that most code uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self._register_load_state_dict_pre_hook(self._translate)

    def _translate(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in list(state):
            if name.startswith(prefix + "dense."):
                state[name.replace("dense.", "linear.", 1)] = state.pop(name)


class Merging(nn.Module):
    """Old files have q, k and v apart; the module joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(6, 2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        parts = [prefix + name for name in "qkv"]
        if all(part in state for part in parts):
            state[prefix + "qkv"] = torch.cat([state.pop(part) for part in parts])
        super()._load_from_state_dict(state, prefix, *args)


def transforming(change: Any, shape: tuple[int, ...]) -> Any:
    """A module class that changes its stored weight while it loads."""

    class Transforming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))
            self.other = nn.Linear(2, 2)

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            state[prefix + "weight"] = change(state[prefix + "weight"])
            super()._load_from_state_dict(state, prefix, *args)

    return Transforming


def scaled_in_place(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight *= 2
    return weight


def first_row_zeroed(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[0] = 0
    return weight


CHANGES = {
    "cat": (lambda w: torch.cat([w[1:], w[:1]]), (3, 3)),
    "double": (lambda w: w * 2, (3, 3)),
    "t": (lambda w: w.t(), (3, 3)),
    "transpose": (lambda w: w.transpose(0, 1), (3, 3)),
    "flip": (lambda w: w.flip(0), (3, 3)),
    "T": (lambda w: w.T, (3, 3)),
    "mT": (lambda w: w.mT, (3, 3)),
    "rows in another order": (lambda w: w[[2, 0, 1]], (3, 3)),
    "in place": (scaled_in_place, (3, 3)),
    "item set": (first_row_zeroed, (3, 3)),
    "reshape": (lambda w: w.reshape(9, 1), (9, 1)),
    "view": (lambda w: w.view(1, 9), (1, 9)),
    "new axes": (lambda w: w[:, :, None, None], (3, 3, 1, 1)),
    "unsqueeze": (lambda w: w.unsqueeze(-1), (3, 3, 1)),
    "half and back": (lambda w: w.to(torch.float16).float(), (3, 3)),
    "to half": (lambda w: w.to(torch.float16), (3, 3)),
    "clone": (lambda w: w.clone(), (3, 3)),
    "slice": (lambda w: w[:2], (2, 3)),
    "clamp": (lambda w: w.clamp(0.8, 1.2), (3, 3)),
}
WRONG_VALUES = "_follow takes a changed placeholder for the stored tensor"


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_module_makes_of_its_weight_while_loading_counts(tmp_path, change):
    """Whatever a module does to a stored tensor before it takes it, the result is load_state_dict's."""
    kind = transforming(*CHANGES[change])
    state = weights(filled(kind())) | {"weight": torch.rand(3, 3) + 0.5}
    agrees_with_torch(kind, state, tmp_path / "a.pth")


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m), lambda m: nn.Sequential(nn.DataParallel(m))])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_private_pre_hook_renames_at_any_depth(tmp_path, wrap, legacy):
    """Names that a module's own hook translates load, at the top, inside, and inside a wrapper."""
    source = filled(Renaming())
    prefix = "" if isinstance(wrap(Renaming()), Renaming) else "0."
    state = {f"{prefix}dense.{k}": v.clone() for k, v in source.linear.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=not legacy)
    for target in (lambda: wrap(Renaming()), wrap(filled(Renaming(), 5))):
        loaded = anycard.load(tmp_path / "old.pth", target)
        assert_same(next(m for m in loaded.modules() if isinstance(m, Renaming)).state_dict(), weights(source))


def test_a_plan_names_what_a_hook_renames_and_touches_nothing(tmp_path):
    """plan runs the same trace: it shows stored and canonical name, and the model stays as it is."""
    state = {f"dense.{k}": v for k, v in filled(nn.Linear(2, 3)).state_dict().items()}
    torch.save(state, tmp_path / "old.pth")
    model = filled(Renaming(), 5)
    with unchanged(model):
        plan = anycard.plan(tmp_path / "old.pth", model)
    assert plan.renamed == {"dense.weight": "linear.weight", "dense.bias": "linear.bias"}
    assert plan.fits and not plan.called


def test_a_module_that_joins_its_old_parts(tmp_path):
    """q, k and v apart in the file become one parameter, inside other modules and beside them."""
    parts = {name: torch.rand(2, 2) for name in "qkv"}
    state = {f"1.{k}": v for k, v in parts.items()} | {"0.weight": torch.rand(2, 2), "0.bias": torch.rand(2)}
    agrees_with_torch(lambda: nn.Sequential(nn.Linear(2, 2), Merging()), state, tmp_path / "parts.pth")
    assert anycard.plan(tmp_path / "parts.pth", nn.Sequential(nn.Linear(2, 2), Merging())).called == ("1",)


def test_a_module_that_forgives_a_missing_name(tmp_path):
    """A module that takes its own name out of the missing ones is believed."""

    class Forgiving(nn.Linear):
        def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
            super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
            missing[:] = [name for name in missing if name != prefix + "bias"]

    agrees_with_torch(lambda: Forgiving(2, 2), {"weight": torch.rand(2, 2)}, tmp_path / "a.pth")


def test_a_module_that_gives_its_own_value_for_a_missing_name(tmp_path):
    """A module that puts its present value where the file has none loads, and keeps that value."""

    class Filling(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            state.setdefault(prefix + "bias", self.bias.detach())
            super()._load_from_state_dict(state, prefix, *args)

    path = tmp_path / "a.pth"
    torch.save({"weight": torch.rand(2, 2)}, path)
    model = filled(Filling(2, 2), 5)
    want = model.bias.detach().clone()
    assert_same_bits(anycard.load(path, model).bias, want)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = anycard.load(path, lambda: Filling(2, 2)).bias
    assert fresh.abs().max() < 1


@pytest.mark.parametrize("inner", [False, True])
def test_a_module_that_throws_away_what_it_no_longer_has(tmp_path, inner):
    """A stored name that the module pops while loading is not unexpected."""

    class Dropping(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            state.pop(prefix + "mask", None)
            super()._load_from_state_dict(state, prefix, *args)

    prefix = "0." if inner else ""
    build = (lambda: nn.Sequential(Dropping(2, 2))) if inner else (lambda: Dropping(2, 2))
    state = {prefix + "weight": torch.rand(2, 2), prefix + "bias": torch.rand(2), prefix + "mask": torch.ones(2)}
    agrees_with_torch(build, state, tmp_path / "a.pth")


def test_an_own_load_state_dict_is_called(tmp_path):
    """A model that overrides load_state_dict (and state_dict) reads the names that it writes."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return OrderedDict((f"v1/{k}", v) for k, v in super().state_dict(*args, **kwargs).items())

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict({k.removeprefix("v1/"): v for k, v in state.items()}, strict, assign)

    source = filled(Own())
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    anycard.save(source, tmp_path / "ours.pth")
    assert list(torch.load(tmp_path / "ours.pth")) == ["v1/fc.weight", "v1/fc.bias"]
    for name in ("theirs.pth", "ours.pth"):
        for target in both(Own):
            assert_same(everything(anycard.load(tmp_path / name, target)), everything(source))


def test_a_post_hook_that_forgives(tmp_path):
    """A hook after loading that takes names out of the missing ones makes a strict load go through."""

    class Tolerant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("steps", torch.arange(3))
            self.register_load_state_dict_post_hook(self._forgive)

        @staticmethod
        def _forgive(module: nn.Module, keys: Any) -> None:
            keys.missing_keys[:] = [k for k in keys.missing_keys if not k.endswith("steps")]

    state = weights(filled(nn.Linear(2, 2)))
    agrees_with_torch(Tolerant, {f"fc.{k}": v for k, v in state.items()}, tmp_path / "a.pth")


def test_a_post_hook_runs_after_the_weights_are_there(tmp_path):
    """What a hook computes from the loaded weights is computed from the new ones."""

    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("total", torch.zeros(()), persistent=False)
            self.register_load_state_dict_post_hook(self._add_up)

        @staticmethod
        def _add_up(module: nn.Module, _: Any) -> None:
            module.total.copy_(module.fc.weight.detach().sum())

    agrees_with_torch(Derived, weights(filled(Derived())), tmp_path / "a.pth")


def test_what_a_module_computes_after_loading_its_parameters(tmp_path):
    """A cache that `_load_from_state_dict` computes from the loaded parameter is right."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("inverse", torch.ones(3), persistent=False)

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            self.inverse.copy_(1 / self.weight.detach())

    agrees_with_torch(Cached, {"weight": torch.rand(3) + 1}, tmp_path / "a.pth")


@pytest.mark.parametrize("how", ["data", "mul_", "fill_"])
def test_what_a_module_changes_after_loading_its_parameters(tmp_path, how):
    """In-place changes to the loaded parameter after the copy hold, too."""

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("loads", torch.zeros(1))

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            with torch.no_grad():
                if how == "data":
                    self.weight.data[0] = 0
                elif how == "mul_":
                    self.weight.mul_(2)
                else:
                    self.loads.fill_(9)

    agrees_with_torch(After, {"weight": torch.rand(3) + 1, "loads": torch.ones(1)}, tmp_path / "a.pth")


def test_a_module_that_copies_by_itself(tmp_path):
    """`self.weight.data.copy_(state[...])`, the oldest idiom, under another name."""

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
            self.weight.data.copy_(state[prefix + "w"])

    path = tmp_path / "a.pth"
    torch.save({"w": torch.rand(3) + 3}, path)
    want = torch.load(path)["w"]
    for target in both(Copying):
        assert_same_bits(anycard.load(path, target).weight, nn.Parameter(want))


def test_a_buffer_whose_size_is_the_files(tmp_path):
    """A module that takes over a buffer of any length does so here, and its old one is not written past."""

    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("items", torch.zeros(0))

        def _load_from_state_dict(self, state, prefix, *args):
            if prefix + "items" in state:
                self.items = state[prefix + "items"].clone()
            super()._load_from_state_dict(state, prefix, *args)

    state = weights(filled(Queue())) | {"items": torch.rand(7)}
    agrees_with_torch(Queue, state, tmp_path / "a.pth")
    agrees_with_torch(lambda: nn.Sequential(Queue()), {f"0.{k}": v for k, v in state.items()}, tmp_path / "b.pth")


def test_value_dependent_loading(tmp_path):
    """A module that looks at the stored numbers to decide is given real ones."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self.seen = 0

        def _load_from_state_dict(self, state, prefix, *args):
            self.seen = int(state[prefix + "step"])
            if float(state[prefix + "weight"].sum()) < 0:
                state[prefix + "weight"] = -state[prefix + "weight"]
            super()._load_from_state_dict(state, prefix, *args)

    path = tmp_path / "a.pth"
    agrees_with_torch(Picky, {"weight": -torch.rand(3), "step": torch.tensor(12)}, path)
    assert anycard.load(path, Picky).seen == 12


class Refusing(Merging):
    """Loads itself, and fails after it has changed things."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        float(state[prefix + "qkv"].sum())
        raise RuntimeError("no weights for me")


class Replacing(nn.Module):
    """Loads itself by putting a new buffer in the place of the old."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.items = state[prefix + "items"] * 2


def test_a_refusal_of_a_module_that_loads_itself_changes_nothing(tmp_path):
    """A module raises in the middle of its loading: every tensor of the whole model is as it was."""
    state = {f"1.{k}": torch.rand(2, 2) for k in "qkv"} | {"0.weight": torch.rand(2, 2), "0.bias": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.Linear(2, 2), Refusing()), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "no weights for me")


def test_a_later_refusal_puts_back_what_an_earlier_module_replaced(tmp_path):
    """One module replaced its buffer, the next refuses: the first has its old buffer again."""
    state = {f"1.{k}": torch.rand(2, 2) for k in "qkv"} | {"0.items": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(Replacing(), Refusing()), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "no weights for me")


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_not_strict_holds_for_modules_that_load_themselves(tmp_path, what):
    """strict=False loads what fits of a module that computes, and says what it left out."""

    class Computing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.bias = nn.Parameter(torch.zeros(2))

        def _load_from_state_dict(self, state, prefix, *args):
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *args)

    state = {"weight": torch.rand(2)} | (
        {"bias": torch.rand(2), "gamma": torch.rand(2)} if what == "unexpected" else {}
    )
    torch.save(state, tmp_path / "a.pth")
    model = filled(Computing(), 5)
    name = "gamma" if what == "unexpected" else "bias"
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, name)
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), name)
    assert_same_bits(model.weight.detach(), state["weight"] * 2)


def test_only_keeps_its_hands_off_other_modules_that_load_themselves(tmp_path):
    """only= names one part: a self-loading module elsewhere is not called."""
    state = {f"1.{k}": torch.rand(2, 2) for k in "qkv"} | {"0.weight": torch.rand(2, 2), "0.bias": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.Linear(2, 2), Merging()), 5)
    before = everything(model)
    anycard.load(tmp_path / "a.pth", model, only="0")
    assert_same_bits(model[0].weight.detach(), state["0.weight"])
    assert_same_bits(model[1].qkv.detach(), before["1.qkv"])


def test_device_tagged_old_names_of_a_module_that_loads_itself(tmp_path):
    """A hook's renames and a file from absent cards go together."""
    with tagged("cuda:5"):
        torch.save(
            {f"module.dense.{k}": v for k, v in filled(nn.Linear(2, 3)).state_dict().items()}, tmp_path / "a.pth"
        )
    loaded = anycard.load(tmp_path / "a.pth", Renaming)
    assert_same(loaded.linear.state_dict(), weights(filled(nn.Linear(2, 3))))


# -- torch's own modules that do more than copy --------------------------------------------------


def nested_norms(kind: str) -> nn.Module:
    wn = nn.utils.parametrizations
    return {
        "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)),
        "weight norm": lambda: nn.Sequential(wn.weight_norm(nn.Linear(3, 2), dim=None), nn.Linear(2, 2)),
        "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 3, 2)), nn.BatchNorm2d(3)),
        "spectral norm": lambda: nn.Sequential(wn.spectral_norm(nn.Conv2d(2, 3, 2)), nn.BatchNorm2d(3)),
        "orthogonal": lambda: nn.Sequential(wn.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 1)),
        "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        "sync batch norm": lambda: nn.Sequential(nn.SyncBatchNorm(3)),
        "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3),
        "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
        "lstm": lambda: nn.LSTM(3, 2, 2, bidirectional=True),
        "lstm with weight norm": lambda: nn.utils.weight_norm(nn.LSTM(3, 2), "weight_hh_l0"),
        "softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 6, [2, 4]),
        "parameters": lambda: nn.ModuleDict(
            {"p": nn.ParameterList([torch.rand(2), torch.rand(3)]), "d": nn.ParameterDict({"x": torch.rand(1)})}
        ),
        "pruned": lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)),
    }[kind]()


NORMS = (
    "old weight norm", "weight norm", "old spectral norm", "spectral norm", "orthogonal", "instance norm",
    "sync batch norm", "attention", "transformer", "lstm", "lstm with weight norm", "softmax", "parameters", "pruned",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "plain"])
def test_torchs_special_modules_round_trip(tmp_path, kind, suffix):
    """Norms, parametrisations and recurrent layers: what we saved, and what torch saved, loads bit for bit."""
    source = nested_norms(kind)
    for tensor in source.state_dict().values():
        tensor.copy_(torch.rand_like(tensor.float()) + 0.1)
    want = weights(source)
    path = tmp_path / f"a{'.pth' if suffix == 'plain' else suffix}"
    torch.save(source.state_dict(), path) if suffix == "plain" else anycard.save(source, path)
    for target in (lambda: nested_norms(kind), nested_norms(kind)):
        assert_same(weights(anycard.load(path, target)), want)
    if suffix == ".pth":
        theirs = torch.load(path, weights_only=True)
        assert theirs._metadata == source.state_dict()._metadata
        nested_norms(kind).load_state_dict(theirs)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("inner", [False, True])
def test_old_weight_norm_names_load_into_the_new_one_anywhere(tmp_path, inner):
    """weight_g and weight_v of a linear layer in a DataParallel file become parametrizations."""

    def new() -> nn.Module:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=1)
        return nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), layer)}) if inner else nn.Sequential(layer)

    old = nn.utils.weight_norm(nn.Linear(3, 2), dim=1)
    filled(old)
    holder = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), old)}) if inner else nn.Sequential(old)
    torch.save({"model": {f"module.{k}": v for k, v in holder.state_dict().items()}}, tmp_path / "a.pth")
    theirs = new()
    theirs.load_state_dict(holder.state_dict())
    for target in (new, new()):
        assert_same(weights(anycard.load(tmp_path / "a.pth", target)), weights(theirs))


@pytest.mark.parametrize(
    "build", [lambda: nn.LazyLinear(3), lambda: nn.Sequential(nn.LazyConv2d(4, 2), nn.LazyBatchNorm2d())]
)
def test_lazy_modules_take_their_shape_from_the_file(tmp_path, build):
    """A lazy layer that saw no input yet becomes as large as the file says."""
    source = build()
    source(torch.rand(2, 5) if isinstance(source, nn.Linear) else torch.rand(2, 3, 4, 4))
    filled(source)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    anycard.save(source, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        for target in (build, build()):
            assert_same(weights(anycard.load(tmp_path / name, target)), weights(source))


def test_a_plan_leaves_a_lazy_module_lazy(tmp_path):
    """plan, and a load that is refused, give no shape to a layer that has none yet."""
    torch.save({"0.weight": torch.rand(3, 5), "0.bias": torch.rand(3), "odd": torch.rand(1)}, tmp_path / "a.pth")
    model = nn.Sequential(nn.LazyLinear(3))
    anycard.plan(tmp_path / "a.pth", model)
    assert nn.parameter.is_lazy(model[0].weight)
    with pytest.raises(anycard.MismatchError, match="odd"):
        anycard.load(tmp_path / "a.pth", model)
    assert nn.parameter.is_lazy(model[0].weight)


class Stateful(nn.Linear):
    """Keeps more than tensors by torch's own way."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.history: Any = None

    def get_extra_state(self) -> Any:
        return {"amax": torch.tensor([1.5, float("nan")]), "steps": 3, "names": ["a", ("b", None)]}

    def set_extra_state(self, state: Any) -> None:
        self.history = state


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_extra_state_of_plain_data_is_given_back(tmp_path, plain, wrap):
    """Tensors and plain data in extra state go out and come back, from our file and from torch's."""
    source = filled(nn.Sequential(Stateful(2, 2), nn.Linear(2, 2)))
    saver = (lambda m, p: torch.save(m.state_dict(), p)) if plain else anycard.save
    saver(wrap(source), tmp_path / "a.pth")
    for target in both(lambda: nn.Sequential(Stateful(2, 2), nn.Linear(2, 2))):
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert_same(weights(loaded), weights(source))
        assert_same_bits(loaded[0].history["amax"], torch.tensor([1.5, float("nan")]))
        assert loaded[0].history["steps"] == 3
        assert loaded[0].history["names"] == ["a", ("b", None)]


def test_extra_state_of_the_top_module_itself(tmp_path):
    """The model itself has extra state: its name is `_extra_state`, without any prefix."""
    source = filled(Stateful(2, 2))
    anycard.save(source, tmp_path / "a.pth")
    loaded = anycard.load(tmp_path / "a.pth", lambda: Stateful(2, 2))
    assert loaded.history["steps"] == 3
    loaded = anycard.load(tmp_path / "a.pth", nn.DataParallel(Stateful(2, 2)))
    assert loaded.module.history["steps"] == 3


@pytest.mark.parametrize("value", [lambda: argparse.Namespace(a=1), lambda: io.BytesIO(pickle.dumps({"a": 1}))])
def test_extra_state_that_is_an_object_is_an_error_or_said(tmp_path, value):
    """An object as extra state: saving names the module; loading a plain file refuses or warns, never in silence."""

    class Odd(Stateful):
        def get_extra_state(self) -> Any:
            return value()

    source = filled(nn.Sequential(Odd(2, 2)))
    with pytest.raises(anycard.CheckpointError, match=r"0\._extra_state"):
        anycard.save(source, tmp_path / "ours.pth")
    assert not (tmp_path / "ours.pth").exists()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = filled(nn.Sequential(Odd(2, 2)), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError, match="_extra_state"):
        anycard.load(tmp_path / "a.pth", model)
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "_extra_state")
    assert_same(weights(model), weights(source))


@pytest.mark.parametrize("state", [{"steps": 3}, torch.tensor([1.0])], ids=["data", "tensor"])
def test_extra_state_that_the_model_does_not_take_is_unexpected(tmp_path, state):
    """The file has extra state, the model's layer takes none: plain torch refuses, and so do we, by name."""
    torch.save({**weights(filled(nn.Linear(2, 2))), "_extra_state": state}, tmp_path / "a.pth")
    model = filled(nn.Linear(2, 2), 5)
    with pytest.raises(RuntimeError, match="_extra_state"):
        nn.Linear(2, 2).load_state_dict(torch.load(tmp_path / "a.pth"))
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "_extra_state")


def test_missing_extra_state_is_said(tmp_path):
    """The model has extra state, the file none: strict names it, strict=False goes on."""
    torch.save(weights(filled(nn.Linear(2, 2))), tmp_path / "a.pth")
    model = filled(Stateful(2, 2), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "_extra_state")
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "_extra_state")
    assert_same_bits(model.weight, filled(nn.Linear(2, 2)).weight)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d])
@pytest.mark.parametrize("legacy", [True, False])
def test_norms_from_before_the_counter(tmp_path, norm, legacy):
    """Old files lack num_batches_tracked: a new model's counter is 0, an existing one's stays, as in torch."""

    def build() -> nn.Module:
        return nn.Sequential(norm(3, track_running_stats=True, affine=True), nn.Linear(3, 1))

    state = {k: v for k, v in weights(filled(build())).items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=not legacy)
    theirs = filled(build(), 5)
    theirs.load_state_dict(torch.load(tmp_path / "old.pth"))
    assert_same(weights(anycard.load(tmp_path / "old.pth", filled(build(), 5))), weights(theirs))
    assert int(anycard.load(tmp_path / "old.pth", build)[0].num_batches_tracked) == 0


def test_a_counter_that_a_new_file_lacks_is_missing(tmp_path):
    """A state dict of version 2 that lacks the counter lost it: strict loading says so."""
    state = filled(nn.Sequential(nn.BatchNorm1d(3))).state_dict()
    del state["0.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.BatchNorm1d(3)), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "num_batches_tracked")


# -- names and places ----------------------------------------------------------------------------


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


def two_nets(keys: tuple[str, str]) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    one, two = filled(Small(), 1), filled(Small(), 2)
    return {keys[0]: one.state_dict(), keys[1]: two.state_dict()}, one, two


@pytest.mark.parametrize(
    "keys",
    [("online", "target"), ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("netG_A", "netG_B"), ("q", "k")],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_two_state_dicts_that_fit_are_listed_and_key_picks(tmp_path, keys, legacy):
    """Two networks of one shape in a file: the error names both, key= picks, nothing changes before."""
    tree, *nets = two_nets(keys)
    tree |= {"epoch": 3, "optimizer": torch.optim.SGD(nets[0].parameters(), 0.1).state_dict()}
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError) as caught:
        anycard.load(tmp_path / "a.pth", model)
    assert all(repr(key) in str(caught.value) for key in keys)
    for key, net in zip(keys, nets, strict=True):
        assert_same(weights(anycard.load(tmp_path / "a.pth", model, key=key)), weights(net))
        assert_same(anycard.read(tmp_path / "a.pth", key=key), weights(net))
    with pytest.raises(ValueError, match=keys[0]):
        anycard.read(tmp_path / "a.pth", key="nothing")


def test_a_momentum_pair_below_one_wrapper(tmp_path):
    """MoCo's names: query and key encoder in one DataParallel state dict, beside a queue; key= or rename picks."""
    query, key = filled(Small(), 1), filled(Small(), 2)
    state = {f"module.encoder_q.{k}": v for k, v in weights(query).items()}
    state |= {f"module.encoder_k.{k}": v for k, v in weights(key).items()}
    state |= {"module.queue": torch.rand(4, 3), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 3, "arch": "small", "state_dict": state}, tmp_path / "moco.pth.tar")
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError, match=r"encoder_q.*encoder_k"):
        anycard.load(tmp_path / "moco.pth.tar", model)
    rename = [(r"^(module\.)?encoder_q\.", "")]
    with quiet():
        assert_same(
            weights(anycard.load(tmp_path / "moco.pth.tar", model, rename=rename, strict=False)), weights(query)
        )
    with quiet():
        loaded = anycard.load(tmp_path / "moco.pth.tar", Small, key="module.encoder_k", strict=False)
    assert_same(weights(loaded), weights(key))


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "_forward_module.net.", "encoder.backbone."])
def test_a_prefix_that_the_model_lacks_is_found(tmp_path, prefix):
    """Lightning's `model.` and its like: the model's names begin below it."""
    source = filled(Small())
    torch.save({"state_dict": {prefix + k: v for k, v in weights(source).items()}, "epoch": 1}, tmp_path / "a.ckpt")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.ckpt", target)), weights(source))


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


@pytest.mark.parametrize(
    "place",
    [
        lambda nested: nested,
        lambda nested: {"model": nested, "iteration": 5, "args": argparse.Namespace(a=1)},
        lambda nested: {"state_dict": {"net": nested}},
    ],
    ids=["top", "key", "two keys"],
)
def test_a_state_dict_in_nested_dicts(tmp_path, place):
    """Names split over dicts of dicts at odd places join by dots, at the top and below a key."""
    source = filled(Small())
    state = weights(source)
    nested = {
        "stem": {"weight": state["stem.weight"], "bias": state["stem.bias"]},
        "norm": OrderedDict((k[5:], v) for k, v in state.items() if k.startswith("norm.")),
        "head": {"weight": state["head.weight"], "bias": state["head.bias"]},
    }
    torch.save(place(nested), tmp_path / "a.pt")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.pt", target)), state)


def test_two_places_with_one_path_are_not_mixed_up(tmp_path):
    """`{"a": {"b": x}, "a.b": y}`: two tensors of one full path are both kept, or the file is refused."""
    torch.save({"a": {"b": torch.zeros(2)}, "a.b": torch.ones(2)}, tmp_path / "a.pt")
    told(lambda: anycard.read(tmp_path / "a.pt"), "a.b")


def test_integer_keys_are_names(tmp_path):
    """A dict of ints to tensors, as some people number their layers, is read under the numbers."""
    torch.save({0: torch.zeros(2), 1: torch.ones(2)}, tmp_path / "a.pt")
    assert_same(anycard.read(tmp_path / "a.pt"), {"0": torch.zeros(2), "1": torch.ones(2)})


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


# -- parts that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("stored", [1, 10])
@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors", "ours"])
def test_another_number_of_classes(tmp_path, stored, how):
    """A head of another size: refused with both sizes; strict=False fills the rest and keeps the head."""
    source = filled(Small(stored))
    path = tmp_path / "a.pth"
    if how == "safetensors":
        save_file(weights(source), path)
    elif how == "ours":
        anycard.save(source, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=how == "zip")
    model = filled(Small(3), 5)
    before = weights(model)
    error = refused(lambda: anycard.load(path, model), model, "head.weight", "head.bias", f"{stored} x 4", "3 x 4")
    assert error.plan.shapes["head.bias"] == ((stored,), (3,))
    told(lambda: anycard.load(path, model, strict=False), "head.weight", "head.bias")
    want = weights(source) | {k: v for k, v in before.items() if k.startswith("head.")}
    assert_same(weights(model), want)


@pytest.mark.parametrize(
    ("stored", "own"), [((1, 4), (3, 4)), ((4,), (4, 1)), ((2, 6), (3, 4)), ((1, 1), ()), ((1,), (1, 1)), ((0,), (1,))]
)
def test_shapes_never_broadcast(tmp_path, stored, own):
    """Another shape is another shape, though torch's copy_ would stretch it."""
    model = nn.ParameterDict({"w": torch.zeros(own), "v": torch.zeros(2)})
    torch.save({"w": torch.ones(stored), "v": torch.ones(2)}, tmp_path / "a.pth")
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "w")


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_element_into_a_scalar(tmp_path, shape):
    """`(1,)` into `()` is the exception that torch makes, too; the model's shape stays."""
    model = nn.ParameterDict({"w": torch.zeros(())})
    torch.save({"w": torch.full(shape, 3.0)}, tmp_path / "a.pth")
    anycard.load(tmp_path / "a.pth", model)
    assert model["w"].shape == () and model["w"].item() == 3.0


@pytest.mark.parametrize("only_in", ["file", "model"])
def test_leftover_buffers_on_either_side(tmp_path, only_in):
    """Counters of a tool on one side only: named, strict=False loads the rest and keeps what the file lacks."""

    def counted(model: nn.Module) -> nn.Module:
        for module in (model.stem, model.head):
            module.register_buffer("flops__", torch.tensor([5, 6]))
        return model

    source, model = filled(Small()), filled(Small(), 5)
    (counted(source) if only_in == "file" else counted(model))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    before = weights(model)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "stem.flops__", "head.flops__")
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "stem.flops__")
    assert_same({k: v for k, v in weights(model).items() if "flops" not in k}, weights(filled(Small())))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "flops" in k)


def test_a_load_of_nothing_is_never_silent(tmp_path):
    """A file whose names fit nothing is an error with strict=False, too."""
    torch.save({f"other.{k}x": v for k, v in weights(filled(Small())).items()}, tmp_path / "a.pth")
    model = filled(Small(), 5)
    for strict in (True, False):
        with unchanged(model), pytest.raises(anycard.MismatchError):
            anycard.load(tmp_path / "a.pth", model, strict=strict)


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


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (torch.float32, torch.int64), (torch.float64, torch.uint8), (torch.bfloat16, torch.int32),
        (torch.complex64, torch.float32), (torch.float16, torch.bool), (torch.int64, torch.bool),
    ],
)  # fmt: skip
def test_a_cast_that_loses_a_kind_is_refused(tmp_path, stored, own):
    """Float into integer and the like: both dtypes are said, the model is as it was."""
    torch.save({"w": torch.ones(3), "b": torch.ones(2, dtype=stored)}, tmp_path / "a.pth")
    model = nn.ParameterDict({"w": torch.zeros(3)})
    model.register_buffer("b", torch.zeros(2, dtype=own))
    words = [str(d).removeprefix("torch.") for d in (stored, own)]
    assert all(word in str(anycard.plan(tmp_path / "a.pth", model)) for word in words)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "b", *words)


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.float8_e4m3fn, torch.float32),
        (torch.int32, torch.int64), (torch.bool, torch.int64), (torch.int64, torch.float32),
        (torch.uint16, torch.int32), (torch.float32, torch.complex64),
    ],
)  # fmt: skip
def test_a_cast_within_a_kind_is_torchs(tmp_path, stored, own):
    """The model keeps its dtype, and the values are those of torch's own cast."""
    value = torch.tensor([0, 1, 3]).to(torch.float32).to(stored)
    torch.save({"b": value}, tmp_path / "a.pth")
    model = nn.Module()
    model.register_buffer("b", torch.zeros(3, dtype=own))
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.b, value.to(own))


# -- shared memory -------------------------------------------------------------------------------


class Language(nn.Module):
    """Three names for one tensor: embedding, head, and the head of a second model."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.aux = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False)})
        if tied:
            self.lm_head.weight = self.aux["head"].weight = self.wte.weight

    def is_tied(self) -> bool:
        return self.lm_head.weight is self.wte.weight is self.aux["head"].weight


@pytest.mark.parametrize("odd", ["wte.weight", "lm_head.weight", "aux.head.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_tied_in_the_model_but_different_in_the_file(tmp_path, odd, strict):
    """One of three stored copies differs: both names are said, whichever it is, and nothing changes."""
    state = {k: v.clone() for k, v in weights(filled(Language())).items()}
    state[odd] = state[odd] + 1
    torch.save(state, tmp_path / "a.pth")
    model = filled(Language(), 5)
    error = refused(lambda: anycard.load(tmp_path / "a.pth", model, strict=strict), model, odd)
    assert error.plan is not None
    assert model.is_tied()


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight", "aux.head.weight"])
@pytest.mark.parametrize("write", [torch.save, save_file], ids=["zip", "safetensors"])
def test_tied_and_stored_once_under_any_name(tmp_path, kept, write):
    """Any one of the names is enough; the tie stays."""
    source = filled(Language())
    write({kept: source.wte.weight.detach().clone()}, tmp_path / "a")
    for target in both(Language):
        loaded = anycard.load(tmp_path / "a", target)
        assert loaded.is_tied()
        assert_same_bits(loaded.wte.weight, source.wte.weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tied_out_untied_in(tmp_path, suffix):
    """Tied weights load into a model that does not tie them: each name gets the values, no memory is shared."""
    source = filled(Language())
    anycard.save(source, tmp_path / f"a{suffix}")
    for target in (lambda: Language(tied=False), Language(tied=False)):
        loaded = anycard.load(tmp_path / f"a{suffix}", target)
        assert_same(weights(loaded), weights(source))
        assert loaded.wte.weight.data_ptr() != loaded.lm_head.weight.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_ties_survive_a_change_of_dtype(tmp_path, dtype):
    """Ties stay with dtype=, as they do without."""
    anycard.save(filled(Language()), tmp_path / "a.pth")
    for target in both(Language):
        loaded = anycard.load(tmp_path / "a.pth", target, dtype=dtype)
        assert loaded.is_tied()
        assert loaded.wte.weight.dtype == (dtype or torch.float32)


class Transposed(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed: two parameters, one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 2, bias=False)
        self.decoder = nn.Linear(2, 4, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_transposed_tie(tmp_path, suffix):
    """Two parameters that are one memory, one of them transposed, keep values and memory."""
    source = filled(Transposed())
    path = tmp_path / f"a{suffix}"
    anycard.save(source, path)
    for target in both(Transposed):
        loaded = anycard.load(path, target)
        assert_same(weights(loaded), weights(source))
        assert loaded.decoder.weight.data_ptr() == loaded.encoder.weight.data_ptr()


def test_a_transposed_tie_that_the_file_contradicts(tmp_path):
    """One memory in the model, two contradictory tensors in the file: said, not written over one another."""
    state = {"encoder.weight": torch.rand(2, 4), "decoder.weight": torch.rand(4, 2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(Transposed(), 5)
    with unchanged(model):
        told(lambda: anycard.load(tmp_path / "a.pth", model), "encoder.weight", "decoder.weight")


def test_a_missing_part_of_a_shared_memory_is_initialised(tmp_path):
    """Two parameters are views of one memory; the file has one: the factory's other one is initialised."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.empty(8)
            self.a = nn.Parameter(memory[:4])
            self.b = nn.Parameter(memory[4:])
            nn.init.constant_(self.a, 1.0)
            nn.init.constant_(self.b, 2.5)

    torch.save({"a": torch.full((4,), 7.0)}, tmp_path / "a.pth")
    with quiet():
        loaded = anycard.load(tmp_path / "a.pth", Views, strict=False)
    assert_same(
        {k: v.detach() for k, v in loaded.named_parameters()}, {"a": torch.full((4,), 7.0), "b": torch.full((4,), 2.5)}
    )


def test_a_buffer_that_is_a_parameters_memory(tmp_path):
    """A buffer that aliases a parameter stays its alias, and has its values."""

    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("mirror", self.fc.weight.detach())

    source = filled(Alias())
    anycard.save(source, tmp_path / "a.pth")
    for target in both(Alias):
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert_same(weights(loaded), weights(source))
        assert loaded.mirror.data_ptr() == loaded.fc.weight.data_ptr()


# -- targets that cannot simply be written -------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda: torch.zeros(1).expand(3, 3), id="expanded"),
        pytest.param(lambda: torch.zeros(5).unfold(0, 3, 1), id="overlapping"),
        pytest.param(lambda: torch.zeros(3, 6)[:, ::2], id="strided"),
    ],
)
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_targets_of_any_layout_get_the_values(tmp_path, layout, kind):
    """An expanded, overlapping or strided target holds the file's values after, and nothing else is written over."""
    model = nn.Module()
    if kind == "buffer":
        model.register_buffer("w", layout())
    else:
        model.w = nn.Parameter(layout())
    value = torch.arange(9.0).reshape(3, 3) + 1
    torch.save({"w": value}, tmp_path / "a.pth")
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.w.detach(), value)


@pytest.mark.parametrize("stored", ["row-major", "channels-last", "transposed"])
@pytest.mark.parametrize("own", ["row-major", "channels-last"])
def test_memory_formats_of_file_and_model_are_independent(tmp_path, stored, own):
    """Any layout in the file fills any layout in the model, which keeps its own."""
    value = torch.rand(2, 3, 4, 5)
    kept = {
        "row-major": value,
        "channels-last": value.contiguous(memory_format=torch.channels_last),
        "transposed": value.transpose(2, 3).contiguous().transpose(2, 3),
    }[stored]
    model = nn.ParameterDict({"w": torch.zeros(2, 3, 4, 5)})
    if own == "channels-last":
        model.to(memory_format=torch.channels_last)
    stride = model["w"].stride()
    torch.save({"w": kept}, tmp_path / "plain.pth")
    anycard.save({"w": kept}, tmp_path / "ours.pth")
    anycard.save({"w": kept}, tmp_path / "ours.safetensors")
    for name in ("plain.pth", "ours.pth", "ours.safetensors"):
        nn.init.zeros_(model["w"])
        anycard.load(tmp_path / name, model)
        assert_same_bits(model["w"].detach(), value)
        assert model["w"].stride() == stride


def test_tensor_subclasses_stay_what_they_are(tmp_path):
    """A parameter of a tensor subclass is filled and keeps its class."""

    class Marked(torch.Tensor):
        pass

    def build() -> nn.Module:
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(3).as_subclass(Marked))
        model.register_buffer("b", torch.zeros(3).as_subclass(Marked))
        return model

    torch.save({"w": torch.rand(3), "b": torch.rand(3)}, tmp_path / "a.pth")
    theirs = build()
    theirs.load_state_dict(torch.load(tmp_path / "a.pth"))
    for target in (build, build()):
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert type(loaded.w.data) is type(theirs.w.data)
        assert type(loaded.b) is Marked
        for name in ("w", "b"):
            got, want = (getattr(m, name).detach().as_subclass(torch.Tensor) for m in (loaded, theirs))
            assert_same_bits(got, want)


def test_a_model_built_in_inference_mode(tmp_path):
    """Inference tensors have no version: they are filled all the same, in and out of the mode."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    with torch.inference_mode():
        model = filled(Small(), 5)
        anycard.load(tmp_path / "a.pth", model)
        fresh = anycard.load(tmp_path / "a.pth", Small)
    assert_same(weights(model), weights(source))
    assert_same(weights(fresh), weights(source))


def test_a_load_makes_an_old_backward_pass_fail_loudly(tmp_path):
    """Gradients through values that a load has replaced are an error of autograd, not wrong numbers."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)
    model.eval()
    loss = (model.head(model.norm(model.stem(torch.rand(2, 2, 3))).squeeze(-1)) ** 2).sum()
    anycard.load(tmp_path / "a.pth", model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parameters_keep_their_identity(tmp_path, dtype):
    """An optimizer that holds the parameters goes on with the loaded ones; gradients and flags stay."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)
    model.stem.weight.requires_grad_(False)
    held = list(model.parameters())
    anycard.load(tmp_path / "a.pth", model, dtype=dtype)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * (len(held) - 1)]
    assert all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("mode", ["context", "default"])
def test_a_default_device_of_the_callers_does_not_matter(tmp_path, mode):
    """Under `torch.device(...)` or set_default_device, read gives CPU tensors and load fills."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    model = filled(Small(), 5)
    if mode == "context":
        with torch.device("meta"):
            got = anycard.read(tmp_path / "a.pth")
            anycard.load(tmp_path / "a.pth", model)
            anycard.save(model, tmp_path / "b.pth")
    else:
        torch.set_default_device("meta")
        try:
            got = anycard.read(tmp_path / "a.pth")
            anycard.load(tmp_path / "a.pth", model)
            anycard.save(model, tmp_path / "b.pth")
        finally:
            torch.set_default_device(None)
    assert_same(got, weights(source))
    assert_same(weights(model), weights(source))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_a_default_dtype_of_the_callers_does_not_matter(tmp_path):
    """set_default_dtype changes what a factory builds, never what is read."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    torch.set_default_dtype(torch.float64)
    try:
        got = anycard.read(tmp_path / "a.pth")
        loaded = anycard.load(tmp_path / "a.pth", Small)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, weights(source))
    assert loaded.head.weight.dtype == torch.float64
    assert_same_bits(loaded.head.weight, source.head.weight.double())


# -- the meta device -----------------------------------------------------------------------------


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("how", ["zip", "legacy", "ours"])
def test_a_model_on_the_meta_device_becomes_real(tmp_path, device, how):
    """Parameters, buffers and ties of a model without memory come out real, on the CPU if nothing else is asked."""
    source = filled(nn.ModuleDict({"a": Small(), "b": Language()}))
    path = tmp_path / "a.pth"
    if how == "ours":
        anycard.save(source, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=how == "zip")
    model = on_meta(lambda: nn.ModuleDict({"a": Small(), "b": Language()}))
    model["a"].head.weight.requires_grad_(False)
    loaded = anycard.load(path, model, device=device)
    assert loaded is model
    assert_same(weights(model), weights(source))
    assert model["b"].is_tied()
    assert not model["a"].head.weight.requires_grad and model["a"].head.bias.requires_grad
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_what_a_meta_model_cannot_know_is_said(tmp_path):
    """A non-persistent buffer on meta, and a parameter that the file lacks: named, never left as garbage."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    source = filled(Table())
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = on_meta(Table)
    with pytest.raises(anycard.CheckpointError, match="table"):
        anycard.load(tmp_path / "a.pth", model, device="cpu")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    torch.save({"fc.weight": torch.rand(2, 2)}, tmp_path / "part.pth")
    model = on_meta(lambda: nn.ModuleDict({"fc": nn.Linear(2, 2)}))
    told(lambda: anycard.load(tmp_path / "part.pth", model, strict=False), "fc.bias")
    assert model["fc"].bias.is_meta or torch.isfinite(model["fc"].bias).all()


def test_a_meta_model_that_loads_itself_keeps_its_ties(tmp_path):
    """Where a module must be called for real, a meta model's ties are still one parameter."""

    class Tied(Merging):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2, bias=False)
            self.two = nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    weight = torch.rand(2, 2)
    state = {k: torch.rand(2, 2) for k in "qkv"} | {"one.weight": weight, "two.weight": weight}
    torch.save(state, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", on_meta(Tied), device="cpu")
    assert model.one.weight is model.two.weight
    assert_same_bits(model.one.weight.detach(), weight)
    assert_same_bits(model.qkv.detach(), torch.cat([state[k] for k in "qkv"]))


def test_old_norms_of_a_meta_model(tmp_path):
    """Counters that an old file lacks are 0 in a model that had no memory."""
    state = {k: v for k, v in weights(filled(Small())).items() if "num_batches" not in k}
    torch.save(state, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", on_meta(Small))
    assert_same_bits(model.norm.num_batches_tracked, torch.tensor(0))
    assert_same({k: v for k, v in weights(model).items() if "num_batches" not in k}, state)


# -- whole models and other objects --------------------------------------------------------------

SCRIPT = """
import sys, torch
from torch import nn
class Trained(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        self.note = "made in a script"
if __name__ == "__main__":
    torch.manual_seed(3)
    model = Trained()
    torch.save(model, sys.argv[1])
    torch.save(nn.DataParallel(model), sys.argv[2], _use_new_zipfile_serialization=False)
    torch.save(model.state_dict, sys.argv[3])
    import anycard
    anycard.save(model, sys.argv[4], whole=True)
    torch.save(model.state_dict(), sys.argv[5])
"""


def test_a_class_of_another_script(tmp_path):
    """Whole models of a training script's __main__: weights load without the class, rebuilding asks for it."""
    (tmp_path / "train.py").write_text(SCRIPT)
    names = ["a.pth", "b.pkl", "c.pt", "d.pt", "weights.pth"]
    paths = [tmp_path / name for name in names]
    subprocess.run([sys.executable, str(tmp_path / "train.py"), *map(str, paths)], check=True)
    want = torch.load(paths[-1], weights_only=True)

    def build() -> nn.Module:
        return nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))})

    for path in paths[:-1]:
        assert_same(anycard.read(path), want)
        for target in both(build):
            assert_same(weights(anycard.load(path, target)), want)
        with pytest.raises(anycard.UntrustedError, match=r"__main__\.Trained"):
            anycard.load(path)
        with pytest.raises(anycard.UntrustedError):
            anycard.load(path, allow=["__main__"])
    main = sys.modules["__main__"]
    namespace: dict[str, Any] = {"__name__": "__main__x"}
    exec(SCRIPT, namespace)
    kind = namespace["Trained"]
    kind.__module__ = "__main__"
    main.Trained = kind
    try:
        rebuilt = anycard.load(paths[0], allow=["__main__.Trained"])
    finally:
        del main.Trained
    assert type(rebuilt) is kind and rebuilt.note == "made in a script"
    assert_same(weights(rebuilt), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_model_object_of_another_dtype_within_a_dict(tmp_path, dtype, legacy):
    """{"ema": None, "model": <module>, ...} of an absent package: its weights load, cast to the model's dtype."""
    package = types.ModuleType("absent_pkg")
    kind = type("Detector", (Small,), {"__module__": "absent_pkg"})
    package.Detector = kind
    sys.modules["absent_pkg"] = package
    try:
        source = filled(kind()).to(dtype)
        source.stride = torch.tensor([8.0, 16.0])
        tree = {"epoch": 4, "ema": None, "model": source, "updates": 0, "opt": {"lr": 0.1}}
        with quiet():  # the legacy writer wants the class's source code
            torch.save(tree, tmp_path / "best.pt", _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["absent_pkg"]
    want = {k: v.float() if v.is_floating_point() else v for k, v in weights(source).items()}
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "best.pt", target)), want)
    assert_same(weights(anycard.load(tmp_path / "best.pt", Small, dtype="auto")), weights(source))
    assert_same(anycard.read(tmp_path / "best.pt"), weights(source))
    assert "absent_pkg" not in sys.modules
    with pytest.raises(anycard.UntrustedError, match=r"absent_pkg\.Detector"):
        anycard.load(tmp_path / "best.pt")


def test_two_model_objects_in_one_file(tmp_path):
    """model and ema both as objects: both are named, key= picks."""
    one, two = filled(Small(), 1), filled(Small(), 2)
    torch.save({"model": one, "ema": two}, tmp_path / "a.pt")
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError, match=r"'model'.*'ema'"):
        anycard.load(tmp_path / "a.pt", model)
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small, key="ema")), weights(two))


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


# -- the assignment that loads nothing -----------------------------------------------------------


@pytest.mark.parametrize("where", ["top", "inner", "wrapped"])
def test_an_assigned_state_dict_anywhere_is_found(tmp_path, where):
    """`x.state_dict = loaded` on the model, a submodule or below a wrapper: save, load and plan say so."""
    model = filled(Small(), 5)
    torch.save(filled(Small()).state_dict(), tmp_path / "a.pth")
    victim = {"top": model, "inner": model.norm, "wrapped": model}[where]
    victim.state_dict = torch.load(tmp_path / "a.pth")
    outer = nn.DataParallel(model) if where == "wrapped" else model
    (tmp_path / "old.pth").write_bytes(b"old")
    for call in (
        lambda: anycard.load(tmp_path / "a.pth", outer),
        lambda: anycard.plan(tmp_path / "a.pth", outer),
        lambda: anycard.save(outer, tmp_path / "old.pth"),
        lambda: anycard.save(outer, tmp_path / "old.pth", whole=True),
    ):
        with unchanged(model), pytest.raises(anycard.CheckpointError, match="state_dict"):
            call()
    assert (tmp_path / "old.pth").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "old.pth"]


def test_a_whole_model_saved_after_the_assignment(tmp_path):
    """Its file holds two sets of weights: read gives the module's own and warns, naming the dict."""
    model, other = filled(Small(), 5), filled(Small())
    model.state_dict = other.state_dict()
    torch.save(model, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="state_dict"):
        assert_same(anycard.read(tmp_path / "a.pt"), weights(filled(Small(), 5)))


def test_the_forgotten_call_of_a_wrapped_model(tmp_path):
    """`torch.save(model.state_dict, f)` of DataParallel and of a submodule is read as that module."""
    source = filled(Small())
    torch.save(nn.DataParallel(source).state_dict, tmp_path / "a.pt")
    torch.save({"net": source.state_dict, "epoch": 2}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        for target in both(Small):
            assert_same(weights(anycard.load(tmp_path / name, target)), weights(source))


# -- what goes wrong late ------------------------------------------------------------------------


def test_an_optimizer_that_refuses_leaves_the_model_alone(tmp_path):
    """In a dict of objects the model is filled first; where the optimizer then refuses, it is as it was."""
    source = filled(Small())
    anycard.save({"model": source, "optimizer": torch.optim.Adam(source.parameters())}, tmp_path / "a.ckpt")
    model = filled(Small(), 5)
    other = torch.optim.Adam([model.stem.weight])
    before = other.state_dict()["param_groups"]
    with unchanged(model), pytest.raises(anycard.CheckpointError, match="optimizer"):
        anycard.load(tmp_path / "a.ckpt", {"model": model, "optimizer": other})
    assert other.state_dict()["param_groups"] == before


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.float16)])
def test_a_hook_that_raises_after_loading(tmp_path, dtype):
    """A post-hook raises: an existing model is restored, also where it had got new memory."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)

    def hook(module: nn.Module, keys: Any) -> None:
        raise ZeroDivisionError

    model.register_load_state_dict_post_hook(hook)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        anycard.load(tmp_path / "a.pth", model, dtype=dtype)


def test_extra_state_that_is_refused_after_loading(tmp_path):
    """set_extra_state raises: the model's tensors are as they were."""

    class Refuses(Stateful):
        def set_extra_state(self, state: Any) -> None:
            raise ZeroDivisionError

    anycard.save(filled(Refuses(2, 2)), tmp_path / "a.pth")
    model = filled(Refuses(2, 2), 5)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        anycard.load(tmp_path / "a.pth", model)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_an_interrupt_in_the_middle(tmp_path, dtype):
    """Ctrl-C while bytes are read: an existing small model is restored."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        anycard.load(tmp_path / "a.pth", model, dtype=dtype, progress=stop)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_verify_finds_damage_before_an_existing_model_is_touched(tmp_path, suffix):
    """One flipped bit: verify=True names the tensor and changes nothing; a factory's load checks by itself."""
    path = tmp_path / f"a{suffix}"
    anycard.save(filled(Small()), path)
    data = bytearray(path.read_bytes())
    with anycard.open(path) as ckpt:
        data[ckpt.tensors["head.weight"].offset] ^= 1
    path.write_bytes(data)
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.FormatError):
        anycard.load(path, model, verify=True)
    if suffix == ".pth":
        with pytest.raises(anycard.FormatError, match=r"head\.weight"):
            anycard.load(path, Small)


# -- dicts of objects ----------------------------------------------------------------------------


def test_a_whole_training_run_goes_out_and_comes_back(tmp_path):
    """Model, optimizer, scheduler, scaler and random states: each is restored, plain torch reads the file."""

    def run(seed: int) -> tuple[nn.Module, Any, Any, Any]:
        model = filled(Small(), seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 10), torch.amp.GradScaler("cpu")

    model, optimizer, scheduler, scaler = run(0)
    model.norm(model.stem(torch.rand(2, 2, 5))).sum().backward()
    optimizer.step()
    scheduler.step()
    tree = {
        "model": nn.DataParallel(model), "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
        "torch_rng": torch.get_rng_state(), "rng": random.getstate(), "numpy_rng": np.random.get_state(),
        "losses": collections.defaultdict(list, {"train": [0.5, 0.25]}), "counts": collections.Counter("aab"),
        "epoch": 3,
    }  # fmt: skip
    anycard.save(tree, tmp_path / "run.ckpt")
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["losses"] == {"train": [0.5, 0.25]}
    fresh = run(5)
    objects = dict(zip(("model", "optimizer", "scheduler", "scaler"), fresh, strict=True))
    state = anycard.load(tmp_path / "run.ckpt", objects)
    assert_same(weights(fresh[0]), weights(model))
    momentum = (o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, fresh[1]))
    assert_same_bits(*momentum)
    assert fresh[2].state_dict() == scheduler.state_dict()
    assert fresh[3].state_dict() == scaler.state_dict()
    assert state["epoch"] == 3 and state["counts"] == {"a": 2, "b": 1}
    random.setstate(state["rng"])
    torch.set_rng_state(state["torch_rng"])


def test_what_cannot_be_saved_is_named_by_its_path(tmp_path):
    """An object of a class of its own: named by its place, and the old file stays."""
    (tmp_path / "a.ckpt").write_bytes(b"old")
    for odd in (argparse.Namespace(a=1), lambda: 1, torch.Generator(), io.StringIO()):
        with pytest.raises(anycard.CheckpointError, match=r"config\.1"):
            anycard.save({"model": Small(), "config": [1, odd]}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("tree", [{"module": ...}, {"module": ..., "optimizer": None, "global_steps": 3}])
def test_deepspeeds_key_is_not_a_wrapper(tmp_path, tree):
    """{"module": state dict, ...}: the outer key goes, the names are the model's."""
    source = filled(Small())
    torch.save(tree | {"module": source.state_dict()}, tmp_path / "a.pt")
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small)), weights(source))
    assert_same(anycard.read(tmp_path / "a.pt"), weights(source))


def test_the_reference_scripts_of_torchvision(tmp_path):
    """model and model_ema in one file: both fit, so both are named; key= gives either, with its counter."""
    source, ema = filled(Small()), AveragedModel(filled(Small(), 1))
    ema.n_averaged.fill_(9)
    tree = {"model": source.state_dict(), "model_ema": ema.state_dict(), "epoch": 1, "args": argparse.Namespace(a=1)}
    torch.save(tree, tmp_path / "a.pth")
    for target in (Small, nn.DataParallel(Small())):
        with pytest.raises(anycard.CheckpointError, match="model_ema"):
            anycard.load(tmp_path / "a.pth", target)
    assert_same(weights(anycard.load(tmp_path / "a.pth", Small, key="model_ema")), weights(ema.module))
    assert int(anycard.load(tmp_path / "a.pth", AveragedModel(Small()), key="model_ema").n_averaged) == 9


def test_averages_of_another_library(tmp_path):
    """timm's ModelEmaV2 keeps the model under `module`: its file fits the bare model, and the other way round."""
    from timm.utils import ModelEmaV2

    source = filled(Small())
    ema = ModelEmaV2(source)
    anycard.save(ema, tmp_path / "ours.pth")
    torch.save({"state_dict_ema": ema.state_dict()}, tmp_path / "theirs.pth")
    anycard.save(source, tmp_path / "bare.pth")
    for name in ("ours.pth", "theirs.pth", "bare.pth"):
        assert_same(weights(anycard.load(tmp_path / name, Small)), weights(source))
        assert_same(weights(anycard.load(tmp_path / name, ModelEmaV2(filled(Small(), 5))).module), weights(source))


# -- whole models of odd make --------------------------------------------------------------------


def add_one(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


class Odd(nn.Module):
    """Keeps things that people keep on models."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.same = self.fc
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.slice = torch.rand(4)[1:3]
        self.activation = nn.functional.relu
        self.add = functools.partial(torch.add, 1)
        self.dtype, self.shape, self.device = torch.bfloat16, torch.Size([1, 2]), torch.device("cpu")
        self.names = {"b", "a"}
        self.counts = collections.defaultdict(int, {1: 2})
        self.order = OrderedDict(a=1)
        self.array, self.score = np.arange(3), np.float32(2)
        self.fc.register_forward_hook(add_one)
        self.fc.requires_grad_(False)


@pytest.mark.parametrize("plain", [True, False])
def test_a_whole_model_with_odd_attributes(tmp_path, plain):
    """Shared modules, hooks, arrays, sets, partials, sizes: rebuilt with exactly the classes that the error names."""
    model = filled(Odd())
    torch.save(model, tmp_path / "a.pt") if plain else anycard.save(model, tmp_path / "a.pt", whole=True)
    assert_same(anycard.read(tmp_path / "a.pt"), weights(model))
    with pytest.raises(anycard.UntrustedError) as caught:
        anycard.load(tmp_path / "a.pt")
    for rebuilt in (
        torch.load(tmp_path / "a.pt", weights_only=False),
        anycard.load(tmp_path / "a.pt", allow=list(caught.value.needed)),
    ):
        assert_same(everything(rebuilt), everything(model))
        assert rebuilt.fc is rebuilt.same
        assert not rebuilt.fc.weight.requires_grad
        assert_same_bits(rebuilt.slice, model.slice)
        x = torch.rand(1, 2)
        assert_same_bits(rebuilt.fc(x), model.fc(x))
        assert rebuilt.add(2) == 3 and rebuilt.activation is nn.functional.relu
        assert (rebuilt.dtype, rebuilt.shape, rebuilt.device) == (model.dtype, model.shape, model.device)
        assert rebuilt.names == {"a", "b"} and rebuilt.counts[1] == 2
        assert (rebuilt.array == model.array).all() and rebuilt.score == 2 and rebuilt.order == model.order


@pytest.mark.parametrize("value", [torch.Size([2, 3]), collections.defaultdict(list), collections.Counter("aab")])
def test_containers_on_a_whole_model_keep_their_class(tmp_path, value):
    """A torch.Size, a defaultdict or a Counter that a whole model keeps is one again after anycard.load."""
    model = nn.Linear(2, 2)
    model.kept = value
    anycard.save(model, tmp_path / "a.pt", whole=True)
    assert type(torch.load(tmp_path / "a.pt", weights_only=False).kept) is type(value)
    try:
        kept = anycard.load(tmp_path / "a.pt").kept
    except anycard.UntrustedError as error:
        kept = anycard.load(tmp_path / "a.pt", allow=list(error.needed)).kept
    assert type(kept) is type(value) and kept == value


class WithLambda(nn.Module):
    """Keeps what cannot be pickled, some levels down."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.blocks[0].act = lambda x: x


def test_what_cannot_be_pickled_is_named_by_its_path(tmp_path):
    """A lambda on a submodule: the error says where, and the old file stays."""
    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(anycard.CheckpointError, match=r"blocks\.0\.act"):
        anycard.save(WithLambda(), tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_parametrised_model_as_a_whole(tmp_path):
    """torch cannot pickle a parametrised module: a CheckpointError names it, and its weights can be saved."""
    model = nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(anycard.CheckpointError, match="1"):
        anycard.save(model, tmp_path / "a.pt", whole=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_whole_model_with_old_norms(tmp_path):
    """The old weight and spectral norm keep hook objects: the file works in torch, here by allow=, and for weights."""

    def build() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)), nn.utils.spectral_norm(nn.Linear(2, 2))).eval()

    model = build()
    anycard.save(model, tmp_path / "a.pt", whole=True)
    x = torch.ones(1, 2)
    assert_same_bits(torch.load(tmp_path / "a.pt", weights_only=False)(x), model(x))
    try:
        rebuilt = anycard.load(tmp_path / "a.pt")
    except anycard.UntrustedError as error:
        rebuilt = anycard.load(tmp_path / "a.pt", allow=list(error.needed))
    assert_same_bits(rebuilt(x), model(x))
    assert_same(weights(anycard.load(tmp_path / "a.pt", build)), weights(model))


def test_a_whole_model_of_torchs_own_layers_needs_no_trust(tmp_path):
    """Recurrent, attention and embedding layers rebuild without allow= and compute the same."""
    layers = {"gru": nn.GRU(2, 3), "enc": nn.TransformerEncoderLayer(4, 2, 4), "bag": nn.EmbeddingBag(3, 2)}
    model = filled(nn.ModuleDict(layers)).eval()
    anycard.save(model, tmp_path / "a.pt", whole=True)
    rebuilt = anycard.load(tmp_path / "a.pt")
    x, y = torch.rand(2, 1, 2), torch.rand(2, 1, 4)
    assert_same(weights(rebuilt), weights(model))
    assert_same_bits(rebuilt["gru"](x)[0], model["gru"](x)[0])
    assert_same_bits(rebuilt["enc"](y), model["enc"](y))


# -- other odds ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (("generator",), "module."),
        pytest.param(("state_dict",), "model.net."),
        pytest.param(("generator", "discriminator"), "module."),
    ],
)
def test_a_vocoders_old_names_below_a_key(tmp_path, keys, prefix):
    """Nothing but old weight norm names, below a key and a prefix, beside another network: found by what fits."""

    def build() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False)))

    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2, bias=False)))
    tree: dict[str, Any] = {"steps": 4}
    for key in keys:
        net = old if key == keys[0] else nn.Sequential(nn.Conv1d(3, 4, 5))
        tree[key] = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save(tree, tmp_path / "a.pth")
    assert_same_bits(anycard.load(tmp_path / "a.pth", build)[0].parametrizations.weight.original1, old[0].weight_v)


def test_a_module_that_loads_itself_under_two_names(tmp_path):
    """One weight-normed module under two attributes is filled once, right, and stays one."""

    def build() -> nn.Module:
        model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))})
        model["b"] = model["a"]
        return model

    source = filled(build())
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    anycard.save(source, tmp_path / "ours.pth")
    for name in ("theirs.pth", "ours.pth"):
        for target in both(build):
            loaded = anycard.load(tmp_path / name, target)
            assert loaded["a"] is loaded["b"]
            assert_same(weights(loaded), weights(source))


def test_parameters_that_are_views_of_one_flat_memory(tmp_path):
    """A flattened model is saved like any other, and is filled within its flat memory."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    model = filled(Small(), 5)
    flat, start = torch.zeros(sum(p.numel() for p in model.parameters())), 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    anycard.load(tmp_path / "a.pth", model)
    assert_same(weights(model), weights(source))
    assert_same_bits(flat, nn.utils.parameters_to_vector(source.parameters()).detach())
    anycard.save(model, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_modules_without_elements_and_without_tensors(tmp_path, suffix):
    """An embedding of nothing and a layer without parameters are part of a model like any other."""

    def build() -> nn.Module:
        return nn.ModuleDict({"none": nn.Embedding(0, 3), "act": nn.ReLU(), "fc": nn.Linear(2, 2)})

    anycard.save(filled(build()), tmp_path / f"a{suffix}")
    for target in both(build):
        assert_same(weights(anycard.load(tmp_path / f"a{suffix}", target)), weights(filled(build())))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_without_any_tensor(tmp_path, suffix):
    """A model of nothing but activations goes out and comes back, as load_state_dict lets it."""
    anycard.save(nn.ReLU(), tmp_path / f"a{suffix}")
    anycard.load(tmp_path / f"a{suffix}", nn.ReLU())


@pytest.mark.parametrize("only", ["stem", "stem.*", ["stem.weight", "stem.bias"], lambda n: n.startswith("stem")])
def test_only_what_was_asked_for_changes(tmp_path, only):
    """only= as a name, a glob, a list and a function: the rest may be of another shape and stays."""
    source, model = filled(Small()), filled(Small(5), 5)
    anycard.save(source, tmp_path / "a.pth")
    want = weights(model) | {k: v for k, v in weights(source).items() if k.startswith("stem")}
    anycard.load(tmp_path / "a.pth", model, only=only)
    assert_same(weights(model), want)
    with unchanged(model), pytest.raises(ValueError, match="matches none"):
        anycard.load(tmp_path / "a.pth", model, only="nothing*")


def test_only_in_a_factory_initialises_the_rest(tmp_path):
    """What only= leaves out of a built model is initialised, not left as memory happened to be."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    loaded = anycard.load(tmp_path / "a.pth", Small, only="stem")
    assert_same_bits(loaded.stem.weight, source.stem.weight)
    assert 0 < loaded.head.weight.abs().max() <= 0.5
    assert_same_bits(loaded.norm.running_var, torch.ones(4))


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


# -- more odds -----------------------------------------------------------------------------------


def test_a_refused_cast_is_left_out_where_that_is_asked(tmp_path):
    """strict=False: the float for an integer buffer is left out and said, the rest loads."""
    torch.save({"w": torch.ones(3), "b": torch.ones(2)}, tmp_path / "a.pth")
    model = nn.ParameterDict({"w": torch.zeros(3)})
    model.register_buffer("b", torch.zeros(2, dtype=torch.int64))
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "b", "int64")
    assert_same(weights(model), {"w": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)})


class TwoBuffers(nn.Module):
    """One buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.zeros(3)
        self.register_buffer("a", memory)
        self.register_buffer("b", memory)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tied_buffers_stay_one(tmp_path, dtype):
    """Ties of buffers hold like those of parameters: built, existing, on meta, cast."""
    anycard.save(filled(TwoBuffers()), tmp_path / "a.pth")
    for target in (TwoBuffers, TwoBuffers(), on_meta(TwoBuffers)):
        loaded = anycard.load(tmp_path / "a.pth", target, dtype=dtype)
        assert loaded.a is loaded.b
        assert_same_bits(loaded.a, filled(TwoBuffers()).a.to(dtype or torch.float32))


@pytest.mark.parametrize(
    "place",
    [
        lambda model: (model.state_dict(), 5),
        lambda model: [model.state_dict(), torch.optim.Adam(model.parameters()).state_dict(), 3],
        lambda model: (model, torch.optim.Adam(model.parameters()).state_dict()),
        lambda model: {"epoch": 1, "model": None, "ema": model, "updates": 3},
    ],
    ids=["tuple", "list", "module in a tuple", "module under ema"],
)
def test_state_dicts_at_odd_places(tmp_path, place):
    """In a tuple, a list, beside nothing under the usual key: the one state dict is found, and read."""
    source = filled(Small())
    torch.save(place(source), tmp_path / "a.pt")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.pt", target)), weights(source))
    assert_same(anycard.read(tmp_path / "a.pt"), weights(source))


def test_a_model_of_odd_layouts_is_saved(tmp_path):
    """Expanded, overlapping, flipped and permuted tensors go out in every format and read back equal."""
    model = nn.Module()
    model.register_buffer("expanded", torch.rand(1).expand(4, 4))
    model.register_buffer("overlapping", torch.arange(5.0).unfold(0, 3, 1))
    model.register_buffer("part", torch.rand(3, 4)[:, 1:3])
    model.weight = nn.Parameter(torch.rand(2, 3, 4).permute(2, 0, 1))
    want = weights(model)
    for suffix in (".pth", ".safetensors"):
        anycard.save(model, tmp_path / f"a{suffix}")
        assert_same(anycard.read(tmp_path / f"a{suffix}"), want)
    assert_same(torch.load(tmp_path / "a.pth", weights_only=True), want)
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    assert_same(weights(torch.load(tmp_path / "whole.pt", weights_only=False)), want)


@pytest.mark.parametrize("how", [{"suffix": ".pth"}, {"suffix": ".safetensors"}, {"suffix": ".pt", "whole": True}])
def test_a_slice_of_a_large_tensor_is_saved_small(tmp_path, how):
    """A view writes its own bytes only, whatever it is a view of."""
    model = nn.Module()
    model.register_buffer("x", torch.rand(100_000)[10:20])
    path = tmp_path / f"a{how['suffix']}"
    anycard.save(model, path, whole=how.get("whole", False))
    assert path.stat().st_size < 5000


def test_views_of_one_storage_stay_together_in_a_whole_model(tmp_path):
    """In a whole model two overlapping views share memory after loading, as before; only their span is written."""
    memory = torch.rand(100_000)
    model = nn.Module()
    model.register_buffer("x", memory[10:20])
    model.register_buffer("y", memory[15:30])
    anycard.save(model, tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").stat().st_size < 5000
    for loaded in (torch.load(tmp_path / "a.pt", weights_only=False), anycard.load(tmp_path / "a.pt")):
        loaded.x[5] = -1
        assert loaded.y[0] == -1


def test_buffers_that_a_new_version_added(tmp_path):
    """Frequencies, ids, masks, norms of weights: persistent buffers that an old file lacks are computed."""

    class Versioned(nn.Module):
        def __init__(self, new: bool = True) -> None:
            super().__init__()
            self.word = nn.Embedding(8, 4)
            if new:
                self.register_buffer("frequency", 1.0 / (10000 ** (torch.arange(0, 4, 2).float() / 4)))
                self.register_buffer("ids", torch.arange(6).expand(1, -1))
                self.register_buffer("mask", torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4))
                self.register_buffer("length", self.word.weight.detach().norm(dim=1))

    torch.save(filled(Versioned(new=False)).state_dict(), tmp_path / "a.pth")
    with quiet():
        loaded = anycard.load(tmp_path / "a.pth", Versioned, strict=False)
    for name in ("frequency", "ids", "mask"):
        assert_same_bits(getattr(loaded, name), getattr(Versioned(), name), name)
    assert (loaded.length > 0).all() and loaded.length.isfinite().all()
    assert_same_bits(loaded.word.weight, filled(Versioned(new=False)).word.weight)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_gradients_after_a_load(tmp_path, dtype):
    """A model that was trained before is trained on after a load, also in another dtype."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)
    model.stem(torch.rand(1, 2, 4)).sum().backward()
    held = model.stem.weight.grad
    anycard.load(tmp_path / "a.pth", model, dtype=dtype)
    if dtype is None:
        assert model.stem.weight.grad is held
    model.stem(torch.rand(1, 2, 4).to(dtype or torch.float32)).sum().backward()


def test_a_model_in_shared_memory_is_filled_there(tmp_path):
    """share_memory(): other processes see the loaded values, for it is the same memory."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5).share_memory()
    place = model.stem.weight.data_ptr()
    anycard.load(tmp_path / "a.pth", model)
    assert model.stem.weight.is_shared() and model.stem.weight.data_ptr() == place
    assert_same(weights(model), weights(filled(Small())))
    assert_same(weights(anycard.load(tmp_path / "a.pth", lambda: Small().share_memory())), weights(filled(Small())))


def test_other_modes_of_torch_do_not_disturb(tmp_path):
    """no_grad, a dispatch mode of the caller's, deterministic algorithms: a load gives the same."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    want = weights(filled(Small()))
    with torch.no_grad():
        loaded = anycard.load(tmp_path / "a.pth", Small)
    assert loaded.stem.weight.requires_grad
    assert_same(weights(loaded), want)
    with FlopCounterMode(display=False):
        assert_same(weights(anycard.load(tmp_path / "a.pth", Small)), want)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(weights(anycard.load(tmp_path / "a.pth", Small)), want)
        assert_same(anycard.read(tmp_path / "a.pth"), want)
    finally:
        torch.use_deterministic_algorithms(False)


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


def test_a_part_of_a_larger_model(tmp_path):
    """The file of a model with two encoders, for one encoder: both places are named, key= picks one."""
    large = filled(nn.ModuleDict({"enc": nn.Sequential(nn.Linear(2, 2)), "dec": nn.Sequential(nn.Linear(2, 2))}))
    anycard.save(large, tmp_path / "a.pth")
    part = filled(nn.Sequential(nn.Linear(2, 2)), 5)
    with unchanged(part), pytest.raises(anycard.CheckpointError, match=r"enc.*dec"):
        anycard.load(tmp_path / "a.pth", part)
    anycard.load(tmp_path / "a.pth", part, key="dec")
    assert_same(weights(part), weights(large["dec"]))


def test_a_dict_of_objects_is_checked_before_any_is_filled(tmp_path):
    """Two models: where the second does not fit, or is not in the file, the first is as it was."""
    one, two = filled(Small()), filled(Small(7), 1)
    anycard.save({"g": nn.DataParallel(one), "d": two}, tmp_path / "a.ckpt")
    g, d, bad = filled(Small(), 5), nn.DataParallel(filled(Small(7), 6)), filled(Small(8), 6)
    for objects in ({"g": g, "d": bad}, {"g": g, "nothing": d}):
        with unchanged(g), unchanged(bad), pytest.raises(anycard.MismatchError):
            anycard.load(tmp_path / "a.ckpt", objects)
    anycard.load(tmp_path / "a.ckpt", {"g": g, "d": d})
    assert_same(weights(g), weights(one))
    assert_same(weights(d.module), weights(two))
    assert_same(weights(anycard.load(tmp_path / "a.ckpt", lambda: Small(7))), weights(two))


def test_a_dict_of_objects_from_plain_torch(tmp_path):
    """What torch.save wrote by hand fills a dict of objects just the same."""
    source = filled(Small())
    optimizer = torch.optim.Adam(source.parameters(), lr=0.25)
    tree = {"net": nn.DataParallel(source).state_dict(), "opt": optimizer.state_dict(), "epoch": 2}
    torch.save(tree, tmp_path / "a.ckpt")
    model = filled(Small(), 5)
    other = torch.optim.Adam(model.parameters())
    state = anycard.load(tmp_path / "a.ckpt", {"net": model, "opt": other})
    assert state["epoch"] == 2 and other.param_groups[0]["lr"] == 0.25
    assert_same(weights(model), weights(source))


def test_dtype_is_for_floats_only(tmp_path):
    """dtype= as a dtype or its name changes floats; counters, integers and complex numbers stay."""
    source = filled(Small())
    source.register_buffer("rotation", torch.ones(2, dtype=torch.complex64))
    source.register_buffer("ids", torch.arange(2))
    anycard.save(source, tmp_path / "a.pth")
    for dtype in ("float16", "torch.float16", torch.float16):
        loaded = anycard.load(tmp_path / "a.pth", copy.deepcopy(source), dtype=dtype)
        assert (loaded.rotation.dtype, loaded.ids.dtype) == (torch.complex64, torch.int64)
        assert {p.dtype for p in loaded.parameters()} == {torch.float16}
        assert (loaded.norm.running_mean.dtype, loaded.norm.num_batches_tracked.dtype) == (torch.float16, torch.int64)
    with unchanged(source), pytest.raises(ValueError, match="float33"):
        anycard.load(tmp_path / "a.pth", source, dtype="float33")
