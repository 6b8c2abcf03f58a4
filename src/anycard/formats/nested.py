"""Flat names back into the dicts and lists that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anycard.errors import FormatError
from anycard.pickles.views import short

_DEEPEST = 200


def nested(values: Mapping[str, Any], paths: Mapping[Any, Any]) -> Any:
    """A tree of the values, each at its path (keys as text, positions in lists as numbers).

    Args:
        paths: Name -> path; a name without a path stays at the top.

    Raises:
        FormatError: A path is none, or two values claim one place.
    """
    tree: dict[Any, Any] = {}
    boxes = {id(tree)}  # the dicts that are made here
    for name, value in values.items():
        path = paths.get(name, (name,))
        if not isinstance(path, tuple) or not 0 < len(path) < _DEEPEST or not all(type(p) in (str, int) for p in path):
            raise FormatError(f"{short(name)!r} has no path that anycard knows", name=short(name))
        at: dict[Any, Any] = tree
        for key in path[:-1]:
            if key not in at:
                at[key] = {}
                boxes.add(id(at[key]))
            inner = at[key]
            if id(inner) not in boxes:
                raise FormatError(f"{short(name)!r} lies below another value", name=short(name))
            at = inner
        if path[-1] in at:
            raise FormatError(f"{short(name)!r} lies where another value lies", name=short(name))
        at[path[-1]] = value
    return _listed(tree, boxes)


def _listed(held: Any, boxes: set[int]) -> Any:
    """Dicts whose keys are all positions from 0 on become lists."""
    if id(held) not in boxes:
        return held
    made = {key: _listed(value, boxes) for key, value in held.items()}
    if made and all(type(key) is int for key in made) and sorted(made) == list(range(len(made))):
        return [made[index] for index in range(len(made))]
    return made
