"""Inert data as plain data, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anycard.names.pickled_modules import is_module
from anycard.pickles.composite import Composite
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_DEEPEST = 50
_MOST = 10_000  # parts of one object that are spelt out


def plain(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Stubs become dicts that name their class; a link back to what holds the value says so.

    Args:
        above: `id` of everything that holds the value.
    """
    return _Plain().of(value, frozenset(above))


class _Plain:
    def __init__(self) -> None:
        self._left = _MOST

    def of(self, value: Any, above: frozenset[int]) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, bytes, complex, TensorInfo)):
            return value
        if isinstance(value, type):
            return f"<{getattr(value, 'module', '?')}.{getattr(value, 'name', value.__name__)}>"
        self._left -= 1
        if id(value) in above or len(above) > _DEEPEST or self._left < 0:
            return "<…>"
        return self._inside(value, above | {id(value)})

    def _inside(self, value: Any, above: frozenset[int]) -> Any:
        if isinstance(value, Mapping):
            return {str(k): self.of(v, above) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(v, above) for v in value]
        if isinstance(value, (set, frozenset)):
            return sorted((self.of(v, above) for v in value), key=repr)
        return self._stub(value, above) if isinstance(value, Inert) else repr(value)

    def _stub(self, value: Inert, above: frozenset[int]) -> dict[str, Any]:
        data: dict[str, Any] = {"__class__": value.path}
        state: Any = value.state
        if is_module(value):
            return data
        if isinstance(value, Composite) and value.parts is not None:
            return {**data, "why": value.why, **{name: self.of(part, above) for name, part in value.parts.items()}}
        if isinstance(state, Mapping):
            data.update({str(k): self.of(v, above) for k, v in state.items()})
        elif state is not None:
            data["state"] = self.of(state, above)
        for label, held in (("args", value.args), ("items", value.items), ("pairs", value.pairs)):
            if held:
                data[label] = self.of(list(held), above)
        return data
