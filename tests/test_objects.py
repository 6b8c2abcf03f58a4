"""Dicts of objects: models, optimizers, schedulers and the like in one file."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from helpers import Small, assert_same, assert_same_bits, filled, unchanged, weights


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
    assert state["epoch"] == 3 and state["counts"] == collections.Counter("aab")
    assert type(state["counts"]) is collections.Counter
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


def test_arguments_that_mean_nothing_for_a_dict_or_a_whole_model_are_refused(tmp_path):
    """None is passed over in silence."""
    model = filled(nn.Linear(2, 2))
    anycard.save({"model": model}, tmp_path / "a.ckpt")
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    with pytest.raises(TypeError, match="key="):
        anycard.load(tmp_path / "a.ckpt", {"model": model}, key="model")
    with pytest.raises(TypeError, match="plan takes one model"):
        anycard.plan(tmp_path / "a.ckpt", {"model": model})
    assert anycard.plan(tmp_path / "a.ckpt", model, key="model").fits
    with pytest.raises(TypeError, match="only="):
        anycard.load(tmp_path / "whole.pt", only="weight")


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


class Colour(enum.Enum):
    RED = 1


class Level(str, enum.Enum):
    HIGH = "high"


def test_keys_are_what_plain_torch_reads(tmp_path):
    """numpy's numbers become numbers, dtypes and tuples stay; an object as a key is refused by name."""
    counts = dict(zip(*np.unique(np.array([3, 3, 4]), return_counts=True), strict=True))
    tree = {"counts": counts, "by": {torch.float16: 1, ("a", np.int64(2)): 2, None: 3}, np.str_("text"): 4}
    anycard.save({"model": Small(), **tree}, tmp_path / "a.ckpt")
    assert anycard.scan(tmp_path / "a.ckpt").clean
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert held["counts"] == {3: 2, 4: 1} and {type(key) for key in held["counts"]} == {int}
    assert held["by"] == {torch.float16: 1, ("a", 2): 2, None: 3} and held["text"] == 4
    anycard.save({Level.HIGH: 1}, tmp_path / "b.ckpt")
    assert [(type(key), key) for key in torch.load(tmp_path / "b.ckpt", weights_only=True)] == [(str, "high")]
    for key in (Colour.RED, Small, ("a", Colour.RED)):
        with pytest.raises(anycard.CheckpointError, match=r"config\.0 has the key .*(Colour|Small)"):
            anycard.save({"config": [{key: 1}]}, tmp_path / "b.ckpt")


class Steps(enum.IntEnum):
    MANY = 7


class Half(float):
    """A number with more to it."""


def test_values_of_subclasses_are_what_plain_torch_reads(tmp_path):
    """Text and numbers of subclasses go by value, a frozenset as a set; a bytearray stays one."""
    tree = {
        "torch": torch.__version__, "steps": Steps.MANY, "level": Level.HIGH, "half": Half(0.5), "text": np.str_("x"),
        "names": frozenset(["b", "a"]), "raw": bytearray(b"\x00\xff"), "list": [Steps.MANY], "w": torch.ones(2),
    }  # fmt: skip
    anycard.save(tree, tmp_path / "a.ckpt")
    assert anycard.scan(tmp_path / "a.ckpt").clean
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert held.pop("w").tolist() == [1, 1]
    assert [(name, type(value)) for name, value in held.items()] == [
        ("torch", str), ("steps", int), ("level", str), ("half", float), ("text", str), ("names", set),
        ("raw", bytearray), ("list", list),
    ]  # fmt: skip
    assert held == {**{name: tree[name] for name in held}, "level": "high"} and type(held["list"][0]) is int
    for within in (frozenset([frozenset()]), {(1, frozenset())}):
        with pytest.raises(anycard.CheckpointError, match=r"config\.0 is a set that holds sets"):
            anycard.save({"config": [within]}, tmp_path / "a.ckpt")


def test_convert_keeps_torchs_version_and_sets(tmp_path):
    """What plain `torch.save` wrote as `torch.__version__` is text; a frozenset is a set, sets of sets stay behind."""
    tree = {"torch": torch.__version__, "names": frozenset("ab"), "raw": bytearray(b"x"), "sets": {frozenset("a")}}
    torch.save({**tree, "w": torch.ones(2)}, tmp_path / "a.pt")
    assert anycard.scan(tmp_path / "a.pt").clean
    done = anycard.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert done.left_behind == ("sets",)
    held = torch.load(tmp_path / "b.pt", weights_only=True)
    assert held["torch"] == str(torch.__version__) and type(held["torch"]) is str
    assert held["names"] == {"a", "b"} and type(held["raw"]) is bytearray


@pytest.mark.parametrize("plain", [True, False])
def test_a_module_without_tensors_among_objects(tmp_path, plain):
    """A loss has no weights: it is saved and loaded like the others; one that has some and finds none is refused."""
    objects = {"model": filled(Small()), "criterion": nn.CrossEntropyLoss()}
    if plain:
        torch.save({name: module.state_dict() for name, module in objects.items()}, tmp_path / "a.ckpt")
    else:
        anycard.save(objects, tmp_path / "a.ckpt")
    model = filled(Small(), 5)
    anycard.load(tmp_path / "a.ckpt", {"model": model, "criterion": nn.MSELoss()})
    assert_same(weights(model), weights(objects["model"]))
    with unchanged(model), pytest.raises(anycard.CheckpointError, match="criterion"):
        anycard.load(tmp_path / "a.ckpt", {"model": model, "criterion": filled(Small(), 5)})


def test_what_could_not_be_put_back_is_named_for_every_object(tmp_path):
    """Two models without a way back, then an optimizer that refuses: `.changed` names all, the message says so once."""
    build = lambda: nn.Linear(4100, 4100, bias=False)  # noqa: E731 - more than what is kept for the way back
    mine = {"g": build(), "d": build()}
    anycard.save({**mine, "opt": torch.optim.SGD([*mine["g"].parameters(), torch.ones(1)], 0.1)}, tmp_path / "a.ckpt")
    wrong = torch.optim.SGD([torch.zeros(1)], 0.1)
    with pytest.raises(anycard.CheckpointError, match="opt would not load") as caught:
        anycard.load(tmp_path / "a.ckpt", {**mine, "opt": wrong})
    assert caught.value.changed == ("g.weight", "d.weight")
    assert "Nothing was changed" not in str(caught.value) and str(caught.value).count("overwritten") == 1


def test_data_that_holds_itself(tmp_path):
    """A dict in itself beside the model: it comes back so; convert leaves it out, and says so."""
    ring: dict[str, Any] = {"a": 1, "t": torch.ones(2)}
    ring["self"] = ring
    shared = torch.rand(3)
    torch.save({"model": filled(Small()).state_dict(), "ring": ring, "list": [shared, shared]}, tmp_path / "a.pt")
    state = anycard.load(tmp_path / "a.pt", {"model": Small()})
    assert state["ring"]["self"] is state["ring"] and state["list"][0] is state["list"][1]
    done = anycard.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert done.left_behind == ("ring.self",)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["ring"]["a"] == 1


def test_convert_says_which_entries_it_leaves_out(tmp_path):
    """A key that takes a class of yours stays behind by name, with no bytes of it; a dtype goes over."""
    tree = {"model": filled(Small()).state_dict(), "by": {torch.float16: torch.ones(2), Colour.RED: torch.ones(3)}}
    torch.save(tree, tmp_path / "a.pt")
    done = anycard.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert len(done.left_behind) == 1 and done.left_behind[0].startswith("by.")
    held = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(held["by"]) == [torch.float16] and done.tensors == len(held["model"]) + 1


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_a_scheduler_that_counts_its_milestones_goes_on(tmp_path, plain, converted):
    """A Counter comes back as one, also to plain PyTorch: a MultiStepLR within a SequentialLR goes on as it would."""

    def run() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD(filled(Small()).parameters(), 1.0)
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 4], gamma=0.5)
        warm = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, steps], [2])

    def rates(scheduler: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
        told = []
        for _ in range(8):
            scheduler.optimizer.step()
            scheduler.step()
            told += scheduler.get_last_lr()
        return told

    path = tmp_path / "a.ckpt"
    optimizer, scheduler = run()
    if plain:
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, path)
    else:
        anycard.save({"optimizer": optimizer, "scheduler": scheduler}, path)
    if converted:
        assert not anycard.convert(path, tmp_path / "b.ckpt").left_behind
        path = tmp_path / "b.ckpt"
    held = torch.load(path, weights_only=True)["scheduler"]["_schedulers"][1]["milestones"]
    assert type(held) is collections.Counter and held == {2: 2, 4: 1}
    other, resumed = run()
    anycard.load(path, {"optimizer": other, "scheduler": resumed})
    assert rates(resumed) == rates(scheduler)


class Keeping(nn.Module):
    """Keeps tensors that are not in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.seen = torch.ones(4)
        self.sizes = {"a": 1}


@pytest.mark.parametrize("target", ["b.pt", "b.safetensors"])
def test_convert_says_which_tensors_of_a_module_it_leaves_out(tmp_path, target):
    """Of a whole model among objects, and of one that is all of the file, what its state dict lacks is listed."""
    torch.save({"model": filled(Keeping()), "epoch": 3}, tmp_path / "a.pt")
    torch.save(filled(Keeping()), tmp_path / "c.pt")
    for name, above in (("a.pt", "model."), ("c.pt", "")):
        done = anycard.convert(tmp_path / name, tmp_path / target, key=above.rstrip(".") or None)
        assert {f"{above}mask", f"{above}seen"} <= set(done.left_behind)
        assert set(anycard.read(tmp_path / target)) == {"fc.weight", "fc.bias"}
    if target == "b.pt":
        done = anycard.convert(tmp_path / "a.pt", tmp_path / target)
        assert {"model.mask", "model.seen"} <= set(done.left_behind) and "epoch" not in done.left_behind


class _Keeping(nn.Module):
    """Keeps tensors wherever Python can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.listed = [torch.ones(1), (nn.Linear(1, 1, bias=False), {"x": torch.ones(2)})]
        self._hidden = {"x": torch.ones(3)}
        self.config = types.SimpleNamespace(mean=torch.ones(4))
        self.back = (self, self.layer, self.layer.weight)


def test_tensors_that_a_module_keeps_anywhere_can_be_read(tmp_path):
    """In lists, tuples, objects and hidden dicts; none twice, and its weights are what they were."""
    model = nn.Sequential(_Keeping(), _Keeping())
    torch.save(model, tmp_path / "a.pt")
    ckpt = anycard.open(tmp_path / "a.pt")
    assert list(ckpt.weights()) == list(model.state_dict())
    kept = ("listed.0", "listed.1.0.weight", "listed.1.1.x", "_hidden.x", "config.mean")
    assert set(ckpt.tensors) == {*model.state_dict(), *(f"{index}.{name}" for index in range(2) for name in kept)}
    assert ckpt.numpy("1.config.mean").tolist() == [1.0] * 4
    assert {"0.listed", "0.config", "0.back"} <= set(ckpt.objects)
