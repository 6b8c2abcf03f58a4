"""Dotted paths, and how they move when modules above them have another path elsewhere."""

from __future__ import annotations

from collections.abc import Mapping


def join(path: str, name: object) -> str:
    """One path below another; "" is the top."""
    return f"{path}.{name}" if path else str(name)


def moved(path: str, paths: Mapping[str, str]) -> str:
    """A module's path elsewhere, by the deepest module at or above it that `paths` knows."""
    head = path
    while head not in paths:
        if not head:
            return path
        head = head.rpartition(".")[0]
    rest = path[len(head) + 1 :] if head else path
    return join(paths[head], rest) if rest else paths[head]


def translated(name: str, paths: Mapping[str, str]) -> str:
    """A tensor's name elsewhere: its own part stays, its module's path is moved."""
    module, _, own = name.rpartition(".")
    return join(moved(module, paths), own)
