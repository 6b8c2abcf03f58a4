"""A file that is cut while it is open: FormatError, never a signal, and the model as it was."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import filled, unchanged

ROWS = 3 << 20  # a few chunks of the reader, so that a read can be met half-way


class Large(nn.Module):
    """Two tensors of several chunks each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(ROWS, 2))
        self.b = nn.Parameter(torch.zeros(ROWS, 2))


@pytest.fixture(scope="module")
def large() -> nn.Module:
    return filled(Large())


@pytest.fixture(params=["a.pt", "legacy.pt", "a.safetensors", "a.pkl"])
def path(request: pytest.FixtureRequest, tmp_path: Path, large: nn.Module) -> Path:
    """The same weights in each format whose bytes lie in the file as they are."""
    made = tmp_path / request.param
    if request.param == "legacy.pt":
        torch.save(large.state_dict(), made, _use_new_zipfile_serialization=False)
    elif request.param == "a.pkl":
        made.write_bytes(pickle.dumps({k: v.detach().numpy() for k, v in large.state_dict().items()}, 4))
    else:
        anycard.save(large, made)
    return made


USES: list[Callable[[anycard.Checkpoint], Any]] = [
    lambda ckpt: [ckpt.torch(name) for name in ckpt.tensors],
    lambda ckpt: [ckpt.numpy(name) for name in ckpt.tensors],
    lambda ckpt: ckpt.fingerprint(),
]


@pytest.mark.parametrize("use", USES, ids=["torch", "numpy", "fingerprint"])
@pytest.mark.parametrize("left", [0.0, 0.6])
def test_cut_between_open_and_read(path: Path, use: Any, left: float) -> None:
    """What was proved at opening is proved again by the read itself."""
    with anycard.open(path) as ckpt:
        assert ckpt.tensors
        os.truncate(path, int(path.stat().st_size * left))
        with pytest.raises(anycard.FormatError, match="cut short"):
            use(ckpt)


class Cut:
    """A progress function that cuts the file once something has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.called = False

    def __call__(self, done: int, total: int) -> None:
        if not self.called and 0 < done < total:
            os.truncate(self.path, 1000)
            self.called = True


@pytest.mark.parametrize("how", ["read", "factory", "model"])
def test_cut_during_a_read(path: Path, how: str) -> None:
    """Half-way through a long read: an error, and an existing model has its old bytes back."""
    cut = Cut(path)
    if how == "model":
        model = filled(Large(), 5)
        with unchanged(model), pytest.raises(anycard.CheckpointError, match="cut short"):
            anycard.load(path, model, progress=cut)
    else:
        with pytest.raises(anycard.FormatError, match="cut short"):
            anycard.read(path, progress=cut) if how == "read" else anycard.load(path, Large, progress=cut)
    assert cut.called


def test_cut_while_it_is_converted(path: Path, tmp_path: Path) -> None:
    """No half file is left at the target."""
    target = tmp_path / "out" / "x.pt"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(anycard.FormatError, match="cut short"):
        anycard.convert(path, target, progress=Cut(path))
    assert target.read_bytes() == b"old" and len(list(target.parent.iterdir())) == 1
