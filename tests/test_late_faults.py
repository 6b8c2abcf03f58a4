"""What goes wrong late, when a load has begun, leaves an existing model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import Small, filled, unchanged


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


@pytest.mark.parametrize("width", [4, 256])
def test_an_empty_tensor_among_those_that_come_back(tmp_path, width):
    """Buffers without elements stand between tensors that are to be restored, small ones and large ones."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("nothing", torch.zeros(0))
            self.weight = nn.Parameter(torch.zeros(width, width))

    build = lambda: nn.Sequential(*[Between() for _ in range(70)])  # noqa: E731
    anycard.save(filled(build()), tmp_path / "a.pth")
    model = filled(build(), 5)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        anycard.load(tmp_path / "a.pth", model, progress=stop)


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


def test_damage_in_new_memory_is_found_unless_nothing_is_to_be_checked(tmp_path):
    """One flipped bit where an existing model takes new memory, straight or by a copy: only verify=False lets it be."""
    path = tmp_path / "a.pth"
    anycard.save(filled(Small()), path)
    data = bytearray(path.read_bytes())
    with anycard.open(path) as ckpt:
        data[ckpt.tensors["head.weight"].offset] ^= 1
    path.write_bytes(data)
    with torch.device("meta"):
        empty = Small()
    wide = filled(Small().double(), 5)
    for model, options in ((empty, {}), (filled(Small(), 5), {"dtype": torch.float64}), (wide, {"dtype": "float32"})):
        with pytest.raises(anycard.FormatError, match=r"head\.weight"):
            anycard.load(path, model, **options)
    with unchanged(wide), pytest.raises(anycard.FormatError, match=r"head\.weight"):
        anycard.load(path, wide, verify=True)
    anycard.load(path, wide, verify=False)
    anycard.load(path, wide)  # in place, by a copy
    anycard.load(path, Small, dtype=torch.float64, verify=False)
    anycard.load(path, empty, verify=False)


def test_a_hook_that_gives_other_memory_and_raises(tmp_path):
    """A post-hook halves a parameter before it raises: its old values come back, in memory of their own size."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)

    def hook(module: nn.Module, keys: Any) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.half()
        raise ZeroDivisionError

    model.register_load_state_dict_post_hook(hook)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        anycard.load(tmp_path / "a.pth", model)
