"""How the files come about: a wrapper around the model, then one of the writers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch

import anycard
from anycard.matrix import rows
from anycard.matrix.commands import Save

_CARD = "cuda:7"


def wrapped(model: torch.nn.Module, saved_from: str) -> torch.nn.Module:
    """The model as it stands when it is saved. DDP is not here: a worker of several holds one."""
    if saved_from == rows.DATA_PARALLEL:
        return cast(torch.nn.Module, torch.nn.DataParallel(model))
    if saved_from == rows.COMPILED:
        return cast(torch.nn.Module, torch.compile(model))  # a wrapper only: nothing compiles before a call
    return model


def write(model: torch.nn.Module, command: Save, rank: int) -> None:
    """Save as the row says. The libraries write on rank 0; anycard may be called on every rank."""
    if command.writer == "anycard":
        anycard.save(model, command.path, whole=command.what == "whole")
    elif rank == 0:
        with _tagged(command.saved_from == rows.ABSENT_CARD):
            _WRITERS[command.writer, command.what](model, command.path)


def _torch_weights(model: torch.nn.Module, path: str) -> None:
    torch.save(model.state_dict(), path)


def _torch_object(model: torch.nn.Module, path: str) -> None:
    torch.save(model, path)


def _torch_method(model: torch.nn.Module, path: str) -> None:
    torch.save(model.state_dict, path)  # the missing () is the point


def _library(model: torch.nn.Module, path: str) -> None:
    # Not save_file(model.state_dict()): it refuses tied parameters, and the library says to use this.
    from safetensors.torch import save_model

    save_model(model, path)


_WRITERS: dict[tuple[str, str], Callable[[torch.nn.Module, str], None]] = {
    ("torch", "weights"): _torch_weights,
    ("torch", "whole"): _torch_object,
    ("torch", "method"): _torch_method,
    ("safetensors", "weights"): _library,
}


@contextmanager
def _tagged(absent: bool) -> Iterator[None]:
    """Let `torch.save` tag storages with a card that is not here, as a machine with eight would."""
    serialization = torch.serialization
    tag = serialization.location_tag
    if absent:
        serialization.location_tag = lambda storage: _CARD
    try:
        yield
    finally:
        serialization.location_tag = tag
