"""What a module keeps, before code of its own runs on it: to see whether it changed, and to put it back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

import torch
from torch import nn

from anycard.torch.dtypes import is_plain

_CONTAINERS = (dict, OrderedDict, list, set)


class Attributes:
    """The attributes of modules, what their containers hold, and the values of tensors among them.

    Parameters and buffers are put back as objects; what is written into them is not looked at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(module, dict(vars(module))) for module in modules]
        self._inside = [(value, copy(value)) for value in self._values() if type(value) in _CONTAINERS]
        tensors = [value for value in self._values() if isinstance(value, torch.Tensor) and is_plain(value)]
        self._tensors = [(t, t._version, t.detach().clone()) for t in tensors if not (t.is_meta or t.is_inference())]

    def _values(self) -> Iterator[Any]:
        return (value for _, held in self._kept for value in held.values())

    def changed(self) -> bool:
        """Something is another object than it was, or a tensor among the attributes was written to."""
        if any(_differ(vars(module), held) for module, held in self._kept):
            return True
        if any(tensor._version != version for tensor, version, _ in self._tensors):
            return True
        return any(_differ(dict(enumerate(_parts(a))), dict(enumerate(_parts(b)))) for a, b in self._inside)

    def put_back(self) -> None:
        """Make everything as it was."""
        for module, held in self._kept:
            vars(module).clear()
            vars(module).update(held)
        for container, held in self._inside:
            container.clear()
            container.extend(held) if isinstance(container, list) else container.update(held)
        with torch.no_grad():
            for tensor, version, old in self._tensors:
                if tensor._version != version:
                    tensor.copy_(old)


def _differ(now: dict[Any, Any], then: dict[Any, Any]) -> bool:
    return now.keys() != then.keys() or any(value is not then[key] for key, value in now.items())


def _parts(container: Any) -> list[Any]:
    """Keys and values of a dict, the elements of anything else; of a set in an order that stays while it does."""
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)
