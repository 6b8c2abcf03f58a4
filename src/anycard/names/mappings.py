"""Dicts out of a file, whatever their class and their keys: names as text, no two alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anycard.names.pickled_modules import is_module
from anycard.pickles.brief import key_text
from anycard.pickles.stubs import Inert


class Apart:
    """Gives each name once: to one that was given before, a number is added."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)
        self._counts: dict[str, int] = {}

    def name(self, wanted: str) -> str:
        """The name, or the first of its numbers that is free."""
        name = wanted
        while name in self.taken:
            count = self._counts[wanted] = self._counts.get(wanted, 1) + 1
            name = f"{wanted}#{count}"
        self.taken.add(name)
        return name


def named(pairs: Iterable[tuple[object, object]]) -> list[tuple[str, object]]:
    """The entries of a dict by names: a key that is text keeps its own."""
    pairs = list(pairs)
    apart = Apart(key for key, _ in pairs if type(key) is str)
    return [(key if type(key) is str else apart.name(key_text(key)), value) for key, value in pairs]


def mapping_of(obj: object) -> Mapping[Any, Any] | None:
    """A dict, or what an object of a subclass of dict holds by its names; None for anything else."""
    if isinstance(obj, Mapping):
        return obj
    if not isinstance(obj, Inert) or not obj.pairs or is_module(obj):
        return None
    if "mapping" not in obj.known:
        obj.known = {**obj.known, "mapping": dict(named(obj.pairs))}
    held: Mapping[Any, Any] = obj.known["mapping"]
    return held


def items(mapping: object) -> Iterator[tuple[str, object]]:
    """The entries of a mapping, names as text; nothing for anything else."""
    if isinstance(mapping, Mapping):
        yield from entries(mapping)


def entries(mapping: Mapping[Any, Any]) -> list[tuple[str, object]]:
    """The same, of what is known to be one."""
    return list(mapping.items()) if set(map(type, mapping)) <= {str} else named(mapping.items())
