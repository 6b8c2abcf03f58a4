"""Modules whose hooks, or whose own load_state_dict, take part in a load."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import agrees_with_torch, assert_same, both, everything, filled, tagged, unchanged, weights


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


def test_device_tagged_old_names_of_a_module_that_loads_itself(tmp_path):
    """A hook's renames and a file from absent cards go together."""
    with tagged("cuda:5"):
        torch.save(
            {f"module.dense.{k}": v for k, v in filled(nn.Linear(2, 3)).state_dict().items()}, tmp_path / "a.pth"
        )
    loaded = anycard.load(tmp_path / "a.pth", Renaming)
    assert_same(loaded.linear.state_dict(), weights(filled(nn.Linear(2, 3))))


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


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_an_own_load_state_dict_is_called_where_all_names_agree(tmp_path, wrap):
    """Nothing in the names, shapes and dtypes says that the model does more; it does all the same."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict({k: 2 * v for k, v in state.items()}, strict, assign)

    state = {"fc.weight": torch.rand(2, 2), "fc.bias": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = wrap(Doubling())
    assert anycard.plan(tmp_path / "a.pth", model).called == ("Doubling",)
    anycard.load(tmp_path / "a.pth", model)
    assert_same({n.removeprefix("module."): t for n, t in weights(model).items()}, {n: 2 * t for n, t in state.items()})


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
