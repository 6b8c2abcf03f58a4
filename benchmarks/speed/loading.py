"""Contestants that bring a file into a model. Each prepares `(what the clock sees, the check of its result)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import anycard
from speed.checks import Act, Check, cast_module, same_bytes, same_module
from speed.floors import read_all
from speed.subjects import FILES, Subject


def kind_of(path: Path) -> str:
    """Which of a subject's files this is."""
    return next(kind for kind, name in FILES.items() if name == path.name)


def existing(subject: Subject, dtype: str = "") -> nn.Module:
    """A model that is there, its memory touched, its values wrong; of the file's dtype where none is given."""
    with torch.device("meta"):
        model = subject.model.factory()()
    model.to_empty(device="cpu")
    if dtype:
        model.to(getattr(torch, dtype))
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    return model


def usual_recipe(subject: Subject, path: Path) -> tuple[Act, Check]:
    """What every tutorial does: build, read, copy."""
    factory = subject.model.factory()

    def act() -> nn.Module:
        model = factory()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model

    return act, same_module(subject)


def bare_fresh(subject: Subject, path: Path) -> tuple[Act, Check]:
    """The least that a new model takes: its modules without memory, and the bytes read into fresh memory."""
    factory = subject.model.factory()

    def act() -> memoryview:
        with torch.device("meta"):
            factory()
        fresh = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())
        read_all(path, fresh)
        return fresh

    return act, same_bytes(subject, kind_of(path))


def anycard_fresh(subject: Subject, path: Path, **options: Any) -> tuple[Act, Check]:
    """One call, from a path and a factory."""
    factory = subject.model.factory()
    return lambda: anycard.load(path, factory, **options), same_module(subject)


def bare_into(subject: Subject, path: Path) -> tuple[Act, Check]:
    """The least that an existing model takes: the bytes read into memory that is there."""
    target = memoryview(torch.full((path.stat().st_size,), 7, dtype=torch.uint8).numpy())

    def act() -> memoryview:
        read_all(path, target)
        return target

    return act, same_bytes(subject, kind_of(path))


def anycard_into(subject: Subject, path: Path, *, dtype: str = "") -> tuple[Act, Check]:
    """One call, from a path and a model."""
    model = existing(subject, dtype)
    return lambda: anycard.load(path, model), cast_module(path, dtype) if dtype else same_module(subject)


def torch_load(
    subject: Subject, path: Path, *, mmap: bool = False, copy: bool = False, dtype: str = ""
) -> tuple[Act, Check]:
    """torch.load, then load_state_dict or `copy_` by name."""
    model = existing(subject, dtype)

    def act() -> nn.Module:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if copy:
            copy_by_name(model, weights)
        else:
            model.load_state_dict(weights)
        return model

    return act, cast_module(path, dtype) if dtype else same_module(subject)


def copy_by_name(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Each tensor into the one of its name."""
    own = model.state_dict()
    for name, tensor in weights.items():
        own[name].copy_(tensor)
