"""Run a model's factory without the initialisation that a load would overwrite.

A `TorchFunctionMode` (local to this thread) puts off every in-place operation on fresh memory that
depends on nothing but plain values (`uniform_`, `fill_`, `mul_`, …), per storage and in order. Where
anything reads such a storage, what was put off is done first; so what `__init__` computes comes out
right. After the load, `finish` does it for whatever the file did not fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from anycard.torch.overrides import ARITHMETIC, FILLS, METADATA, VIEWS, short_name


class _PutOff(TorchFunctionMode):
    """Records initialisations per storage instead of running them."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, list[tuple[torch.Tensor, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = short_name(func)
        if name in METADATA:
            return func(*args, **kwargs)
        if not args and "tensor" in kwargs:  # as torch.nn.init hands its own functions over
            args, kwargs = (kwargs["tensor"],), {k: v for k, v in kwargs.items() if k != "tensor"}
        if self._can_wait(func, name, args, kwargs):
            target = args[0]
            self.pending.setdefault(_place(target), []).append((target.detach(), func, args[1:], kwargs))
            return target
        if self.pending and name not in VIEWS:
            self._settle((*args, *kwargs.values()))
        return func(*args, **kwargs)

    def _can_wait(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not (name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], torch.Tensor)):
            return False
        target = args[0]
        if target.is_meta or target.layout is not torch.strided or type(target) not in (torch.Tensor, nn.Parameter):
            return False
        if any(isinstance(value, (torch.Tensor, list, tuple)) for value in (*args[1:], *kwargs.values())):
            return False
        fills = name in FILLS or getattr(func, "__module__", "") == "torch.nn.init"
        return fills or (_place(target) in self.pending and name in ARITHMETIC)

    def _settle(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.layout is torch.strided and not value.is_meta:
                    self.run(_place(value))
            elif isinstance(value, (list, tuple)):
                self._settle(value)

    def run(self, place: int) -> None:
        """Do what was put off for a storage."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for target, func, args, kwargs in self.pending.pop(place, ()):
                func(target, *args, **kwargs)


def _place(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage().data_ptr())


class Built:
    """A model fresh from its factory, with what was put off."""

    def __init__(self, model: nn.Module, mode: _PutOff) -> None:
        self.model = model
        self._mode = mode

    def finish(self, filled: Iterable[torch.Tensor]) -> None:
        """Initialise, in the order of `__init__`, all that is not among the tensors to be filled."""
        skip = {_place(t) for t in filled if not t.is_meta and t.layout is torch.strided}
        for place in [p for p in self._mode.pending if p not in skip]:
            self._mode.run(place)


def build(factory: Callable[[], Any]) -> Built:
    """Call the factory; nothing is initialised that can wait.

    Raises:
        TypeError: It does not give an `nn.Module`.
    """
    mode = _PutOff()
    with mode:
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory gave a {type(model).__name__}, not an nn.Module")
    return Built(model, mode)
