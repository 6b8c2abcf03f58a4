"""A warning points at the line of the program that asked, not into anycard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import anycard


def strange() -> nn.Module:
    model = nn.Linear(2, 2)
    model.where = torch.device("cuda:1")  # type: ignore[assignment]
    return model


CALLS: dict[str, Callable[[Path], object]] = {
    "read": lambda folder: anycard.read(folder / "parallel.pth"),
    "load": lambda folder: anycard.load(folder / "parallel.pth", nn.Linear(2, 2, bias=False), strict=False),
    "save": lambda folder: anycard.save(strange(), folder / "whole.pt", whole=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_names_the_callers_line(tmp_path: Path, name: str) -> None:
    """Of each verb that warns."""
    torch.save(nn.DataParallel(nn.Linear(2, 2)).state_dict(), tmp_path / "parallel.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name](tmp_path)
    line = CALLS[name].__code__.co_firstlineno
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line)}
