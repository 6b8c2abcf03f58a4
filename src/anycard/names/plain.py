"""Inert data as plain data, for people and programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anycard.names.mappings import entries
from anycard.names.pickled_modules import is_module
from anycard.pickles.brief import brief
from anycard.pickles.composite import Composite
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_DEEPEST = 50
_MOST = 10_000  # parts of one object that are spelt out
_ALLOWANCE = 200_000  # parts of all objects of a file, and one more for each that has any
_ELEMENTS = 1_000_000  # of all arrays; those of a pickle can share their bytes


def plain(value: Any) -> Any:
    """Stubs become dicts that name their class; a link back to what holds the value says so."""
    return Plain(_MOST).spelt(value)


class Plain:
    """Spells out many objects, which may share parts.

    What a small file holds once can be a part of all of its objects: a set or an array is spelt out once, and
    where parts come up again and again, later ones are `<…>`.

    Args:
        objects: How many there are that are no plain values.
        array: Spells out an array beside the weights.
    """

    def __init__(self, objects: int, array: Callable[[TensorInfo], Any] | None = None) -> None:
        self._all = _ALLOWANCE + objects
        self._left = 0
        self._elements = _ELEMENTS
        self._array = array
        self._known: dict[int, Any] = {}

    @staticmethod
    def is_leaf(value: Any) -> bool:
        """It is plain as it is."""
        return value is None or isinstance(value, (bool, int, float, str, bytes, complex, TensorInfo))

    def spelt(self, value: Any, above: tuple[int, ...] = ()) -> Any:
        """One object.

        Args:
            above: `id` of everything that holds the value.
        """
        self._left = have = max(min(_MOST, self._all), 0)
        if isinstance(value, TensorInfo) and self._array is not None:
            return self._once(value, lambda: self._elements_of(value))
        made = self.of(value, frozenset(above))
        self._all -= have - self._left
        return made

    def _elements_of(self, info: TensorInfo) -> Any:
        self._elements -= info.numel
        return self._array(info) if self._array is not None and self._elements >= 0 else info

    def _once(self, value: Any, make: Callable[[], Any]) -> Any:
        """The same list for the same set or array; coming up again counts as many parts as it has."""
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = make()
            return known
        self._all -= len(known) if isinstance(known, list) else 1
        return known if self._all > 0 else "<…>"

    def of(self, value: Any, above: frozenset[int]) -> Any:
        if self.is_leaf(value):
            return value
        if isinstance(value, type):
            return f"<{getattr(value, 'module', '?')}.{getattr(value, 'name', value.__name__)}>"
        self._left -= 1
        if id(value) in above or len(above) > _DEEPEST or self._left < 0:
            return "<…>"
        return self._inside(value, above | {id(value)})

    def _inside(self, value: Any, above: frozenset[int]) -> Any:
        if isinstance(value, Mapping):
            return {name: self.of(part, above) for name, part in entries(value)}
        if isinstance(value, (list, tuple)):
            return [self.of(v, above) for v in value]
        if isinstance(value, (set, frozenset)):
            return self._once(value, lambda: sorted((self.of(v, above) for v in value), key=brief))
        return self._stub(value, above) if isinstance(value, Inert) else brief(value)

    def _stub(self, value: Inert, above: frozenset[int]) -> dict[str, Any]:
        data: dict[str, Any] = {"__class__": value.path}
        state: Any = value.state
        attributes = value.attributes
        if is_module(value):
            return data
        if isinstance(value, Composite) and value.parts is not None:
            return {**data, "why": value.why, **{name: self.of(part, above) for name, part in value.parts.items()}}
        if attributes is not None:
            data.update({name: self.of(part, above) for name, part in entries(attributes)})
        elif state is not None:
            data["state"] = self.of(state, above)
        for label, held in (("args", value.args), ("items", value.items), ("pairs", value.pairs)):
            if held:
                data[label] = self.of(list(held), above)
        return data
