"""Dicts of objects: models, optimizers, schedulers and the like in one file."""

from __future__ import annotations

import argparse
import collections
import io
import random
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
