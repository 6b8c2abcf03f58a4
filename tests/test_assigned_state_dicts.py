"""The assignment that loads nothing, and the call that was forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anycard
from helpers import Small, assert_same, both, filled, unchanged, weights


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
