"""The lines of `rows`, as functions: `(path, model, allow) -> the module that holds the weights`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

import anycard
from anycard.matrix import rows

Recipe = Callable[[str, torch.nn.Module, Sequence[str]], torch.nn.Module]


def _weights(path: str, model: torch.nn.Module, _allow: Sequence[str]) -> torch.nn.Module:
    model.load_state_dict(torch.load(path))
    return model


def _safetensors(path: str, model: torch.nn.Module, _allow: Sequence[str]) -> torch.nn.Module:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
    return model


def _whole(path: str, _model: torch.nn.Module, _allow: Sequence[str]) -> torch.nn.Module:
    return cast(torch.nn.Module, torch.load(path, weights_only=False))


def _method(path: str, model: torch.nn.Module, _allow: Sequence[str]) -> torch.nn.Module:
    model.load_state_dict(torch.load(path, weights_only=False))
    return model


def _assigned(path: str, model: torch.nn.Module, _allow: Sequence[str]) -> torch.nn.Module:
    model.state_dict = torch.load(path, weights_only=False)  # type: ignore[method-assign]  # the mistake is the point
    return model


def _fill(path: str, model: torch.nn.Module, _allow: Sequence[str]) -> torch.nn.Module:
    anycard.load(path, model)
    return model  # the very model that was given is what must be filled


def _rebuild(path: str, _model: torch.nn.Module, allow: Sequence[str]) -> torch.nn.Module:
    return anycard.load(path, allow=list(allow))


RECIPES: dict[str, Recipe] = {
    rows.WEIGHTS: _weights,
    rows.SAFETENSORS: _safetensors,
    rows.WHOLE: _whole,
    rows.METHOD: _method,
    rows.ASSIGNED: _assigned,
    rows.FILL: _fill,
    rows.REBUILD: _rebuild,
}
