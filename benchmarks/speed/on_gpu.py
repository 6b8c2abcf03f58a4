"""Contestants that bring a file, warm, onto the first CUDA card; each ends when the card has it all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import anycard
from speed.checks import Act, Check, same, same_bytes, same_module
from speed.loading import kind_of
from speed.subjects import Subject


def pinned_copy(subject: Subject, path: Path) -> tuple[Act, Check]:
    """The floor: pinned memory to the card, as fast as the bus goes."""
    pinned = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).pin_memory()
    there = torch.empty_like(pinned, device="cuda")
    check = same_bytes(subject, kind_of(path))
    return _finished(lambda: there.copy_(pinned, non_blocking=True)), lambda got: check(got.cpu().numpy())


def anycard_load(subject: Subject, path: Path) -> tuple[Act, Check]:
    """One call."""
    factory = subject.model.factory()
    return _finished(lambda: anycard.load(path, factory, device="cuda")), same_module(subject)


def torch_load(subject: Subject, path: Path) -> tuple[Act, Check]:
    """torch's tensors alone, without a model."""
    return _finished(lambda: torch.load(path, map_location="cuda", weights_only=True)), _weights(subject)


def safetensors_load(subject: Subject, path: Path) -> tuple[Act, Check]:
    """safetensors' tensors alone, without a model."""
    from safetensors.torch import load_file

    return _finished(lambda: load_file(path, device="cuda")), _weights(subject)


def fastsafetensors_load(subject: Subject, path: Path) -> tuple[Act, Check]:
    """fastsafetensors' tensors alone, without a model; copied, for its own memory goes when the file is closed."""
    from fastsafetensors import fastsafe_open

    def act() -> dict[str, torch.Tensor]:
        with fastsafe_open(filenames=[str(path)], nogds=True, device="cuda:0") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping

    return _finished(act), _weights(subject)


def _finished(act: Callable[[], Any]) -> Act:
    def run() -> Any:
        result = act()
        torch.cuda.synchronize()
        return result

    return run


def _weights(subject: Subject) -> Check:
    return lambda weights: same(subject, weights)
