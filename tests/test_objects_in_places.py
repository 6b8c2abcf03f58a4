"""Objects in dicts and lists, in files of others, and alone: each gets its own state back."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import anycard
from helpers import Small, assert_same, assert_same_bits, filled, unchanged, weights


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model, its optimizer and a scheduler that counts its milestones."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])


@pytest.mark.filterwarnings("ignore")
def test_numbers_that_dcp_writes_as_text_are_numbers_again(tmp_path):
    """An optimizer that never made a step, and a scheduler, go on from a folder of `torch.distributed.checkpoint`."""
    model, optimizer, scheduler = trained()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    dcp.save(states, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    again = dict(zip(states, trained(), strict=True))
    anycard.load(tmp_path / "c", again)
    want, got = optimizer.state_dict()["state"], again["optimizer"].state_dict()["state"]
    assert list(got) == [0, 1]
    assert all(torch.equal(got[i][name], want[i][name]) for i in want for name in want[i])
    assert again["scheduler"].milestones == scheduler.milestones
    assert list(again["scheduler"].milestones.elements()) == [1, 3]


def _adam(model: nn.Module, *, stepped: bool = True) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), 0.25 if stepped else 0.5)
    if stepped:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return optimizer


def test_dicts_and_lists_of_objects_come_back_as_they_were_saved(tmp_path):
    """Objects in dicts in dicts, in lists and under numbers are filled in their places; keys stay what they are."""
    g, d = filled(nn.Linear(2, 2)), filled(nn.Linear(2, 2), 1)
    tree = {
        "models": {"g": g, "d": d},
        "opts": [_adam(g), _adam(d)],
        0: {"net": g, "best": 0.5},
        "loss": [nn.MSELoss()],
    }
    anycard.save(tree, tmp_path / "a.ckpt")
    new = [filled(nn.Linear(2, 2), seed) for seed in (5, 6, 7)]
    opts = [_adam(model, stepped=False) for model in new[:2]]
    wanted = {"models": {"g": new[0], "d": new[1]}, "opts": opts, 0: {"net": new[2]}, "loss": [nn.MSELoss()]}
    state = anycard.load(tmp_path / "a.ckpt", wanted)
    assert state["models"]["d"] is new[1] and state["opts"][1] is opts[1] and state[0] == {"net": new[2], "best": 0.5}
    for got, want in zip(new, (g, d, g), strict=True):
        assert_same(weights(got), weights(want))
    assert_same_bits(opts[1].state_dict()["state"][0]["exp_avg"], tree["opts"][1].state_dict()["state"][0]["exp_avg"])
    held = anycard.load(tmp_path / "a.ckpt", {})
    assert list(held) == ["models", "opts", 0, "loss"] and list(held["opts"][0]["state"]) == [0, 1]
    with unchanged(new[0]), pytest.raises(anycard.MismatchError, match=r"has no \[2\] at 'opts'"):
        anycard.load(tmp_path / "a.ckpt", {"models": {"g": new[0]}, "opts": [*opts, opts[0]]})


def test_one_object_alone(tmp_path):
    """An optimizer that was saved by itself is loaded by itself; a class in an object's place is told apart."""
    optimizer = _adam(filled(nn.Linear(2, 2)))
    anycard.save(optimizer, tmp_path / "a.ckpt")
    other = _adam(nn.Linear(2, 2), stepped=False)
    assert anycard.load(tmp_path / "a.ckpt", other) is other
    assert other.param_groups[0]["lr"] == 0.25 and len(other.state_dict()["state"]) == 2
    with pytest.raises(TypeError, match=r"state is the class Small: an object of it is needed"):
        anycard.load(tmp_path / "a.ckpt", {"state": Small})


def test_a_pickled_object_is_no_state(tmp_path):
    """Where the file has a scheduler or optimizer itself (or its method) instead of its state: refused by name."""
    model = filled(Small())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    tree = {"model": model.state_dict(), "sched": scheduler, "opt": optimizer, "method": optimizer.state_dict}
    torch.save(tree, tmp_path / "a.pt")
    for name, target, kind in (("sched", scheduler, "StepLR"), ("opt", optimizer, "SGD"), ("method", optimizer, "SGD")):
        with (
            unchanged(model),
            pytest.raises(anycard.MismatchError, match=f"'{name}' in the file is a pickled {kind}, not"),
        ):
            anycard.load(tmp_path / "a.pt", {"model": model, name: target})
    assert scheduler.optimizer is optimizer


def test_an_objects_refusal_is_told_with_its_kind(tmp_path):
    """A KeyError alone would be a bare word."""
    torch.save({"opt": {"epoch": 3}}, tmp_path / "a.pt")
    with pytest.raises(anycard.CheckpointError, match="opt would not load its state: KeyError: 'param_groups'"):
        anycard.load(tmp_path / "a.pt", {"opt": torch.optim.SGD([torch.ones(1)], 0.1)})


def test_small_types_come_back_as_they_are(tmp_path):
    """Devices, dtypes, sizes, default dicts and ordered dicts; a tensor as a key is a tensor."""
    tree = {
        "device": torch.device("cuda", 1), "dtype": torch.bfloat16, "size": torch.Size([1, 2]), "kinds": {torch.half},
        "lists": collections.defaultdict(list, a=[1]), "ordered": collections.OrderedDict(a=1), "by": {torch.int8: 1},
    }  # fmt: skip
    torch.save({**tree, "keys": {torch.ones(2): 1}}, tmp_path / "a.pt")
    state = anycard.load(tmp_path / "a.pt", {})
    (key,) = state.pop("keys")
    assert_same_bits(key, torch.ones(2))
    assert state == tree and {name: type(value) for name, value in state.items()} == {
        n: type(v) for n, v in tree.items()
    }
    state["lists"]["b"].append(2)
    del tree["kinds"], tree["lists"]
    anycard.save(tree, tmp_path / "b.pt")
    assert anycard.load(tmp_path / "b.pt", {}) == tree


def test_versions_of_modules_come_back(tmp_path):
    """`read`, and what else a dict of objects gives, keep `_metadata`, which a model may refuse to load without."""
    model = filled(Versioned())
    for path, saved in (("a.pt", model), ("b.safetensors", model), ("c.pt", nn.DataParallel(model))):
        anycard.save(saved, tmp_path / path)
    for path in ("a.pt", "b.safetensors", "c.pt"):
        held = anycard.read(tmp_path / path)
        Versioned().load_state_dict(held)
        anycard.save(held, tmp_path / "again.pt")
        Versioned().load_state_dict(anycard.read(tmp_path / "again.pt"))
    torch.save({"model": model.state_dict(), "ema": {"weights": model.state_dict()}}, tmp_path / "e.pt")
    state = anycard.load(tmp_path / "e.pt", {"model": Versioned()})
    Versioned().load_state_dict(state["ema"]["weights"])


class Versioned(nn.Linear):
    """It refuses a state dict that does not tell its version, as torchvision's mnasnet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(2, 2)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("which version?")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_state_that_holds_a_pickled_object_is_refused(tmp_path):
    """A function or object within a state would come as words about it: refused, unlike torch's small types."""
    model = filled(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for odd, kind in ((optimizer, "an object of torch.optim.sgd.SGD"), (collections.deque, "the class .*deque")):
        torch.save({"model": Small().state_dict(), "sched": {"last_epoch": 3, "of": [odd]}}, tmp_path / "a.pt")
        with pytest.raises(anycard.MismatchError, match=f"the state of 'sched' in the file holds {kind}"):
            anycard.load(tmp_path / "a.pt", {"model": Small(), "sched": scheduler})
        assert scheduler.last_epoch == 0 and not hasattr(scheduler, "of")
    torch.save({"sched": {"last_epoch": 3, "of": [torch.half]}}, tmp_path / "a.pt")
    anycard.load(tmp_path / "a.pt", {"sched": scheduler})
    assert scheduler.of == [torch.half]


def test_keys_that_read_alike_are_told_apart(tmp_path):
    """A model under a number is filled from there, not from the same number as text."""
    one, two = filled(nn.Linear(2, 2)), filled(nn.Linear(2, 2), 1)
    torch.save({0: one.state_dict(), "0": two.state_dict()}, tmp_path / "a.pt")
    new = [filled(nn.Linear(2, 2), 5), filled(nn.Linear(2, 2), 6)]
    anycard.load(tmp_path / "a.pt", {0: new[0], "0": new[1]})
    for got, want in zip(new, (one, two), strict=True):
        assert_same(weights(got), weights(want))


def test_a_model_is_filled_from_its_own_place_only(tmp_path):
    """Where the file has no weights there, those of the same name elsewhere are not taken."""
    held = filled(nn.Linear(2, 2)).state_dict()
    model = filled(nn.Linear(2, 2), 5)
    for there in ({"epoch": 1}, [1], {"inner": {"epoch": 1}}):
        torch.save({"m": there, "x": {"m": held}}, tmp_path / "a.pt")
        with unchanged(model), pytest.raises(anycard.MismatchError, match=r"'m' in the file holds no weights .*'x\.m'"):
            anycard.load(tmp_path / "a.pt", {"m": model})
    torch.save({"m": {"inner": held, "epoch": 1}}, tmp_path / "a.pt")
    anycard.load(tmp_path / "a.pt", {"m": model})
    assert_same(weights(model), held)
