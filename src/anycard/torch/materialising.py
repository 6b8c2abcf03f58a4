"""Inert data out of a file as what it stands for, where that is harmless: tensors, containers, torch's small types."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from anycard.errors import FormatError
from anycard.names.plain import plain
from anycard.names.stored import metadata_of
from anycard.pickles.brief import key_text
from anycard.pickles.stubs import Counted, Defaulting, Inert, Size
from anycard.tensors import TensorInfo
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.reading import read_tensor

_DEEPEST = 200  # levels of containers
# A default dict of any other makes nothing: it is as a plain one.
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bool)}


def materialise(value: Any) -> Any:
    """Plain data with tensors read; stubs become dicts that name their class. What is shared stays shared.

    Raises:
        FormatError: Containers lie in containers far deeper than anything real.
    """
    return Materialiser().of(value)


def objects_in(value: Any) -> Iterator[Inert | type]:
    """What is no plain data in containers of it, which may hold themselves."""
    stack, seen = [value], set()
    while stack:
        held = stack.pop()
        if isinstance(held, (Inert, type)):
            if _small(held) is None:
                yield held
        elif isinstance(held, (Mapping, list, tuple, set, frozenset)) and id(held) not in seen:
            seen.add(id(held))
            stack += [*held.keys(), *held.values()] if isinstance(held, Mapping) else held


def described(odd: Inert | type) -> str:
    """What errors call such a thing."""
    return f"an object of {odd.path}" if isinstance(odd, Inert) else f"the class {str(plain(odd)).strip('<>')}"


class Materialiser:
    """Materialises several values, which may share parts."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        """One value."""
        if id(value) in self._made:
            return self._made[id(value)]
        if depth > _DEEPEST:
            raise FormatError(f"data nested deeper than {_DEEPEST} levels")
        if isinstance(value, TensorInfo):
            return self._done(value, read_tensor(value))
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list):
            items = self._done(value, [])  # it may hold itself, as a mapping may
            items.extend(self.of(v, depth + 1) for v in value)
            return items
        if isinstance(value, tuple):
            kind = torch.Size if isinstance(value, Size) else tuple
            return self._done(value, kind(self.of(v, depth + 1) for v in value))
        if isinstance(value, (set, frozenset)):
            return self._done(value, type(value)(self.key(v, depth + 1) for v in value))
        if isinstance(value, (Inert, type)):
            small = _small(value)
            return plain(value) if small is None else small
        return value

    def key(self, value: Any, depth: int = 0) -> Any:
        """What stands as a key in a dict; as text, where it is an object."""
        made = self.of(value, depth)
        try:
            hash(made)
        except TypeError:
            return key_text(value)
        return made

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[Any, Any]:
        made = _empty_like(value)
        self._done(value, made)
        for key, held in value.items():
            made[self.key(key, depth + 1)] = self.of(held, depth + 1)
        if type(made) is OrderedDict and (metadata := metadata_of(value)):
            made._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
        return made

    def _done(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = made
        return made


def _empty_like(value: Mapping[Any, Any]) -> dict[Any, Any]:
    if isinstance(value, Defaulting):
        known = getattr(value.factory, "module", "") == "builtins"
        return defaultdict(_FACTORIES.get(value.factory.name) if known else None)
    if isinstance(value, Counted):
        return Counter()
    return OrderedDict() if isinstance(value, OrderedDict) else {}


def _small(stub: Any) -> Any:
    """A `torch.dtype` or `torch.device`; None for what is neither."""
    if isinstance(stub, type):
        return TO_TORCH.get(getattr(stub, "name", "")) if getattr(stub, "module", "") == "torch" else None
    kind = type(stub)
    if (kind.module, kind.name) != ("torch", "device") or not stub.args or stub.kwargs:
        return None
    try:
        return torch.device(*stub.args)
    except (RuntimeError, TypeError):  # a device that this PyTorch does not know
        return None
