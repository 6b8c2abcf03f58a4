"""Keys that a file has as text and an object as numbers: `torch.distributed.checkpoint` writes all of them as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def with_own_keys(held: Any, own: Any) -> Any:
    """A state as an object's own `state_dict()` has its keys; what is not of that shape stays as it is.

    An optimizer that never made a step has no state yet: there the numbers of its parameters tell.
    """
    if isinstance(held, list) and isinstance(own, list):
        items = [with_own_keys(a, b) for a, b in zip(held, own, strict=False)] + held[len(own) :]
        return items if any(a is not b for a, b in zip(items, held, strict=True)) else held
    if not isinstance(held, dict) or not isinstance(own, Mapping):
        return held
    numbers = bool(own) and all(type(key) is int for key in own)
    keys = {key: int(key) if numbers and _is_number(key) else key for key in held}
    made = {keys[key]: with_own_keys(value, own.get(keys[key])) for key, value in held.items()}
    if _is_optimizers(made) and any(map(_is_number, made["state"])):
        made["state"] = {int(key) if _is_number(key) else key: value for key, value in made["state"].items()}
    if list(made) == list(held) and all(made[key] is value for key, value in held.items()):
        return held
    return Counter(made) if isinstance(own, Counter) else made


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal()


def _is_optimizers(state: Mapping[Any, Any]) -> bool:
    """A state dict of `torch.optim`, which counts its parameters."""
    groups = state.get("param_groups")
    if not isinstance(state.get("state"), dict) or not isinstance(groups, list):
        return False
    parameters = [group.get("params") for group in groups if isinstance(group, Mapping)]
    return all(isinstance(held, list) and all(type(p) is int for p in held) for held in parameters)
