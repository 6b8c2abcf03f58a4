"""What the calling process asks of a worker. Small and picklable: weights never travel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """Who a worker is. `world` 1 means that it joins no process group at all."""

    model: str
    folder: str  # the caller's current folder: on the import path for the model
    rank: int
    world: int
    rendezvous: str
    log: str


@dataclass(frozen=True)
class Save:
    path: str
    saved_from: str
    what: str
    writer: str


@dataclass(frozen=True)
class Load:
    path: str
    recipe: str


@dataclass(frozen=True)
class Wrap:
    """Wrap what the last `Load` rebuilt for several cards, and compare again."""


Command = Save | Load | Wrap
