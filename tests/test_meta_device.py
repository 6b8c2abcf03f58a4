"""Models on the meta device become real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anycard
from helpers import Language, Small, assert_same, assert_same_bits, filled, on_meta, told, weights


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


def test_old_norms_of_a_meta_model(tmp_path):
    """Counters that an old file lacks are 0 in a model that had no memory."""
    state = {k: v for k, v in weights(filled(Small())).items() if "num_batches" not in k}
    torch.save(state, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", on_meta(Small))
    assert_same_bits(model.norm.num_batches_tracked, torch.tensor(0))
    assert_same({k: v for k, v in weights(model).items() if "num_batches" not in k}, state)
