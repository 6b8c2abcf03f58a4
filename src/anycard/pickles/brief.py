"""Values out of a file as text for people: of a bounded length, at a bounded cost, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from anycard.pickles.stubs import Inert
from anycard.pickles.views import short

_ROOM = 80  # characters of a value
_MOST = 200  # of all
_PARTS = 8  # of a container
_LEVELS = 3
_PLAIN = (str, int, float, bool, bytes, type(None))


def brief(value: object) -> str:
    """Like `repr`, which would spell out all of a container that a small file holds many times over."""
    return _brief(value, _LEVELS)[:_MOST]


def _brief(value: object, levels: int) -> str:
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[:_ROOM]) + ("…" if len(value) > _ROOM else "")
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 4 * _ROOM else "a large number"
    if isinstance(value, type):
        return short(f"{value.module}.{value.name}" if issubclass(value, Inert) else value.__name__)
    if isinstance(value, (tuple, list, set, frozenset, Mapping)):
        return _container(value, levels)
    return short(repr(value))


def _container(value: Iterable[Any], levels: int) -> str:
    held = [_brief(part, levels - 1) for part in islice(value, _PARTS)] if levels else []
    held = sorted(held) if isinstance(value, (set, frozenset)) else held
    more = "…" if len(held) < len(value) else ""  # type: ignore[arg-type]
    inside = ", ".join([*held, more] if more else held)
    if isinstance(value, tuple):
        return f"({inside},)" if len(held) == 1 and not more else f"({inside})"
    return f"[{inside}]" if isinstance(value, list) else f"{{{inside}}}"


def key_text(key: object) -> str:
    """What a key of a dict is called in paths.

    Of an object made of plain values (an Enum's member, a `torch.device`, a namedtuple, a str of someone's own
    class) these values. Two keys may be called the same.
    """
    if type(key) is str:
        return key
    if isinstance(key, Inert) and 0 < len(key.args) <= _PARTS:
        values = [arg for arg in key.args if not isinstance(arg, type)]
        if values and all(isinstance(value, _PLAIN) for value in values):
            return ":".join(value if len(values) == 1 and type(value) is str else _cut(value) for value in values)
    return brief(key)


def _cut(value: object) -> str:
    return short(value) if isinstance(value, str) else brief(value)
