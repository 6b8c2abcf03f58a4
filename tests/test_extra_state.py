"""What modules keep beside their tensors: get_extra_state and set_extra_state."""

from __future__ import annotations

import argparse
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, assert_same_bits, both, filled, refused, told, unchanged, weights


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


def test_extra_state_of_torchs_small_types_is_given_back(tmp_path):
    """A dtype, a device and a size, alone or in dicts, come as what they were, not as words about them."""
    for value in (torch.bfloat16, {"kind": torch.int8, "at": torch.device("cuda", 1), "shape": torch.Size([1, 2])}):

        class Small(Stateful):
            def get_extra_state(self, value: Any = value) -> Any:
                return value

        source = filled(nn.Sequential(Small(2, 2)))
        torch.save(source.state_dict(), tmp_path / "a.pth")
        for target in both(lambda: nn.Sequential(Small(2, 2))):
            history = anycard.load(tmp_path / "a.pth", target)[0].history
            assert history == value and type(history) is type(value)


def test_extra_state_of_the_top_module_itself(tmp_path):
    """The model itself has extra state: its name is `_extra_state`, without any prefix."""
    source = filled(Stateful(2, 2))
    anycard.save(source, tmp_path / "a.pth")
    loaded = anycard.load(tmp_path / "a.pth", lambda: Stateful(2, 2))
    assert loaded.history["steps"] == 3
    loaded = anycard.load(tmp_path / "a.pth", nn.DataParallel(Stateful(2, 2)))
    assert loaded.module.history["steps"] == 3


@pytest.mark.parametrize(
    "value",
    [
        lambda: argparse.Namespace(a=1),
        lambda: io.BytesIO(pickle.dumps({"a": 1})),
        lambda: {"cfg": [argparse.Namespace(a=1)]},
    ],
)
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


def test_extra_state_that_is_a_class_is_named(tmp_path):
    """A class as a value is refused by its own name."""

    class Odd(Stateful):
        def get_extra_state(self) -> Any:
            return {"kind": argparse.Namespace}

    torch.save(filled(Odd(2, 2)).state_dict(), tmp_path / "a.pth")
    model = filled(Odd(2, 2), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "_extra_state", "the class argparse.Namespace,")


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


def test_extra_state_that_is_refused_after_loading(tmp_path):
    """set_extra_state raises: the model's tensors are as they were."""

    class Refuses(Stateful):
        def set_extra_state(self, state: Any) -> None:
            raise ZeroDivisionError

    anycard.save(filled(Refuses(2, 2)), tmp_path / "a.pth")
    model = filled(Refuses(2, 2), 5)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        anycard.load(tmp_path / "a.pth", model)


class Named(Stateful):
    """Keeps its own name."""

    def get_extra_state(self) -> Any:
        return {"name": self.history}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_extra_state_goes_to_its_own_module(tmp_path, plain, wrap):
    """Modules whose paths end alike keep apart, beside a prefix and under a key too."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.ReLU(), Named(2, 2)), Named(2, 2))

    source = filled(build())
    source[0][1].history, source[1].history = "inner", "outer"
    state = {f"net.{name}": value for name, value in wrap(source).state_dict().items()}
    saver = (lambda m, p: torch.save(m.state_dict(), p)) if plain else anycard.save
    saver(wrap(source), tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth")
    for name, options in (("a.pth", {}), ("b.pth", {}), ("b.pth", {"key": "net"})):
        loaded = anycard.load(tmp_path / name, build(), **options)
        assert [loaded[0][1].history, loaded[1].history] == [{"name": "inner"}, {"name": "outer"}]
        assert_same(weights(loaded), weights(source))
