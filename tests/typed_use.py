"""What a program with types of its own may write: `make types` checks that `load` gives back what it was given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

import anycard


class Net(nn.Module):
    """A model of someone's own."""


def build(width: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width))


def fill(path: Path, model: Net) -> Net:
    return anycard.load(path, model, device="cpu", strict=False)


def make(path: str) -> Net:
    return anycard.load(path, Net, rename=[(re.compile("^module"), "")])


def make_by_function(path: str) -> nn.Sequential:
    return anycard.load(path, build, rename=[("a", "b")])


def make_by_lambda(path: str) -> nn.Linear:
    return anycard.load(path, lambda: nn.Linear(2, 2))


def resume(path: str, model: Net) -> dict[str, Any]:
    return anycard.load(path, {"model": model})


def rebuild(path: str) -> nn.Module:
    return anycard.load(path, allow=["package.module"])


def whatever(path: str, model: Any) -> Any:
    return anycard.load(path, model)
