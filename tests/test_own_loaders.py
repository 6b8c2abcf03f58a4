"""What modules that load themselves do beside copying values, and what they refuse: as plain PyTorch has it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, refused, unchanged, weights


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    """As DeepSpeed has in the place of a module's parameters."""


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def ordered() -> nn.Module:
    module = nn.Linear(2, 2)
    module._parameters = Ordered(module._parameters)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("inner", [scripted, ordered])
def test_what_holds_tensors_without_being_a_dict_is_put_back(tmp_path, inner: Callable[[], nn.Module]) -> None:
    """A scripted module, or one with a mapping of its own, below a module with hooks keeps its tensors."""

    def build() -> nn.Module:
        model = nn.Sequential(inner())
        model.register_load_state_dict_post_hook(lambda module, keys: None)
        return model

    source, model = build(), build()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with unchanged(model):
        assert anycard.plan(tmp_path / "a.pth", model).fits
    anycard.load(tmp_path / "a.pth", model)
    assert_same(weights(model), weights(source))


class Turning(nn.Module):
    """Copies a stored tensor into a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("rope", torch.zeros(3), persistent=False)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.rope.copy_(state.pop(f"{prefix}rope"))
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_buffer_that_is_not_stored_gets_what_its_module_copies(tmp_path) -> None:
    """Its own loader fills it from the file, though a plain load never would."""
    torch.save({"w": torch.ones(3), "rope": torch.full((3,), 2.0)}, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", Turning())
    assert model.rope.tolist() == [2, 2, 2]
    assert model.w.tolist() == [1, 1, 1]


class Marking(nn.Linear):
    """Does something to its parameters that is no value."""

    act: Callable[[nn.Parameter], Any] = staticmethod(lambda weight: None)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        type(self).act(self.weight)


ACTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
    "freezes": (lambda w: w.requires_grad_(False), lambda w: not w.requires_grad),
    "sets": (lambda w: setattr(w, "requires_grad", False), lambda w: not w.requires_grad),
    "attribute": (lambda w: setattr(w, "loaded", True), lambda w: getattr(w, "loaded", False)),
    "hook": (lambda w: w.register_hook(lambda grad: grad), lambda w: bool(w._backward_hooks)),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("built", [True, False])
def test_what_a_loader_does_to_its_parameters_stays(tmp_path, monkeypatch, name, built) -> None:
    """It freezes them, marks them, hooks them: on the model's own parameters."""
    act, seen = ACTS[name]
    monkeypatch.setattr(Marking, "act", staticmethod(act))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", (lambda: Marking(2, 2)) if built else Marking(2, 2))
    assert seen(model.weight)


class Scaled(nn.Linear):
    """Swallows what fails."""

    scale = 1.0

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        try:
            self.scale = state.pop(f"{prefix}scale").item()
        except Exception:  # noqa: BLE001 - as people write it
            self.scale = -1.0
        super()._load_from_state_dict(state, prefix, *rest)


def test_what_fails_without_values_and_is_swallowed_is_done_with_values(tmp_path) -> None:
    """A loader that catches its own errors gets real tensors where placeholders would fail."""
    torch.save({**nn.Linear(2, 2).state_dict(), "scale": torch.tensor(5.0)}, tmp_path / "a.pth")
    assert anycard.load(tmp_path / "a.pth", Scaled(2, 2)).scale == 5


def replaced(name: str) -> nn.Module:
    """A module whose method was replaced on the object."""
    module = nn.Linear(2, 2)
    plain = getattr(module, name)

    def own(state: Any, *rest: Any, **options: Any) -> Any:
        return plain({key: value + 1 for key, value in state.items()}, *rest, **options)

    setattr(module, name, own)
    return module


@pytest.mark.parametrize("name", ["_load_from_state_dict", "load_state_dict"])
def test_a_method_replaced_on_the_object_is_asked(tmp_path, name) -> None:
    """What plain PyTorch would call is called, wherever it was set."""
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", replaced(name))
    assert model.weight.tolist() == [[1, 1], [1, 1]]


class Second(nn.Module):
    """Refuses what its first version wrote."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if local.get("version", 1) < 2:
            rest[-1].append("saved by version 1: convert it first")
        super()._load_from_state_dict(state, prefix, local, *rest)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_load_state_dict_pre_hook(lambda *call: call[-1].append("not for this model"))
    return model


REFUSALS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], str]] = {
    "version": (Second, {f"fc.{n}": t for n, t in nn.Linear(2, 2).state_dict().items()}, "convert it first"),
    "hook": (hooked, nn.Sequential(nn.Linear(2, 2)).state_dict(), "not for this model"),
    "statistics": (lambda: nn.Sequential(nn.InstanceNorm2d(2)), {"0.running_mean": torch.ones(2)}, "running stats"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("strict", [True, False])
def test_what_a_module_says_against_a_file_is_said(tmp_path, name, strict) -> None:
    """Its own message refuses the load, with strict=False too, as in plain PyTorch; the plan has it."""
    build, state, words = REFUSALS[name]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=words):
        build().load_state_dict(state, strict=strict)
    model = build()
    plan = anycard.plan(tmp_path / "a.pth", model)
    assert not plan.fits
    assert words in str(plan)
    refused(lambda: anycard.load(tmp_path / "a.pth", model, strict=strict), model, words)


class Lenient(nn.Module):
    """Takes a part of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora = nn.Linear(1, 1), nn.Linear(1, 1)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, False)


def test_a_model_that_takes_a_part_is_taken_at_its_word(tmp_path) -> None:
    """Its own `load_state_dict` goes through without the rest, of which a warning tells."""
    state = {name: torch.ones_like(tensor) for name, tensor in Lenient().state_dict().items() if "lora" in name}
    torch.save(state, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"base\.weight"):
        model = anycard.load(tmp_path / "a.pth", Lenient())
    assert model.lora.weight.item() == 1


def test_loads_in_two_threads_leave_the_generators_seed(tmp_path) -> None:
    """A trace that begins while a factory runs, and ends after it, brings nothing of it back."""
    seed, path = torch.initial_seed(), tmp_path / "a.pth"
    started, inside, goes, done = (threading.Event() for _ in range(4))

    class Slow(nn.Linear):
        def _load_from_state_dict(self, *call: Any) -> None:
            inside.set()
            done.wait(30)
            super()._load_from_state_dict(*call)

    def factory() -> nn.Module:
        started.set()
        goes.wait(30)
        return nn.Linear(2, 2)

    def build() -> None:
        anycard.load(path, factory)
        done.set()

    torch.save(nn.Linear(2, 2).state_dict(), path)
    first, second = threading.Thread(target=build), threading.Thread(target=lambda: anycard.load(path, Slow(2, 2)))
    first.start()
    started.wait(30)
    second.start()
    inside.wait(30)
    goes.set()
    first.join()
    second.join()
    assert torch.initial_seed() == seed
