"""What a module keeps, before code of its own runs on it: to see whether it changed, and to put it back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from anycard.torch.dtypes import is_plain

_CONTAINERS = frozenset([dict, OrderedDict, list, set])
_SIMPLE = frozenset([bool, int, float, str, tuple, type(None)])


_GONE = object()


class Attributes:
    """The attributes of modules, what their containers hold, and the values of tensors among them.

    Parameters and buffers are put back as objects; what is written into them is not looked at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(module, vars(module).copy()) for module in modules]
        odd = [value for _, held in self._kept for value in held.values() if type(value) not in _SIMPLE]
        self._inside = [(value, value.copy()) for value in odd if type(value) in _CONTAINERS]
        tensors = [value for value in odd if isinstance(value, torch.Tensor) and is_plain(value)]
        self._tensors = [(t, t._version, t.detach().clone()) for t in tensors if not (t.is_meta or t.is_inference())]

    def changed(self) -> bool:
        """Something is another object than it was, or a tensor among the attributes was written to."""
        if any(_differ(vars(module), held) for module, held in self._kept):
            return True
        if any(tensor._version != version for tensor, version, _ in self._tensors):
            return True
        return any(_differs(container, held) for container, held in self._inside)

    def put_back(self) -> None:
        """Make everything as it was."""
        for module, held in self._kept:
            if _differ(vars(module), held):
                vars(module).clear()
                vars(module).update(held)
        for container, held in self._inside:
            if _differs(container, held):
                container.clear()
                container.extend(held) if isinstance(container, list) else container.update(held)
        with torch.no_grad():
            for tensor, version, old in self._tensors:
                if tensor._version != version:
                    tensor.copy_(old)


def _differ(now: dict[Any, Any], then: dict[Any, Any]) -> bool:
    return len(now) != len(then) or any(value is not then.get(key, _GONE) for key, value in now.items())


def _differs(container: Any, held: Any) -> bool:
    if not (container or held):
        return False
    if isinstance(container, dict):
        return _differ(container, held)
    if isinstance(container, set):
        return bool(container != held)
    return len(container) != len(held) or any(a is not b for a, b in zip(container, held, strict=True))
