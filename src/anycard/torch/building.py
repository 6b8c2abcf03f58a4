"""Run a model's factory without the initialisation that a load would overwrite.

A `TorchFunctionMode` (local to this thread) puts off every in-place operation on fresh memory that
depends on nothing but plain values (`uniform_`, `fill_`, `mul_`, …), per storage and in order. Where
anything reads such a storage, what was put off is done first; so what `__init__` computes comes out
right. After the load, `finish` does it for whatever the file did not fill.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from anycard.torch.dtypes import PLAIN
from anycard.torch.overrides import ARITHMETIC, FILLS, METADATA, VIEWS, short_name

_LOOK, _VIEW, _FILL, _CHANGE, _OTHER = range(5)  # what a function does to a tensor, see `overrides`


class _PutOff(TorchFunctionMode):
    """Records initialisations per storage instead of running them."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, list[tuple[torch.Tensor, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]] = {}
        self._ways: dict[Any, tuple[int, str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        way, name = self._ways.get(func) or self._learn(func)
        kwargs = kwargs or {}
        if way == _LOOK:
            return func(*args, **kwargs)
        if (frame := _truncating()) is not None:
            return self._truncate(frame, func, name, args, kwargs)
        if not args and "tensor" in kwargs:  # as torch.nn.init hands its own functions over
            args, kwargs = (kwargs["tensor"],), {k: v for k, v in kwargs.items() if k != "tensor"}
        if way in (_FILL, _CHANGE) and (place := self._place_to_wait(way, args, kwargs)) is not None:
            self.pending.setdefault(place, []).append((args[0].detach(), func, args[1:], kwargs))
            return args[0]
        if self.pending and way != _VIEW:
            self._settle((*args, *kwargs.values()))
        return func(*args, **kwargs)

    def _learn(self, func: Any) -> tuple[int, str]:
        """What a function does, and its name; a model's factory calls few functions many times."""
        name = short_name(func)
        in_place = name.endswith("_") and not name.endswith("__")
        if name in METADATA:
            way = _LOOK
        elif in_place and (name in FILLS or getattr(func, "__module__", "") == "torch.nn.init"):
            way = _FILL
        elif in_place and name in ARITHMETIC:
            way = _CHANGE
        else:
            way = _VIEW if name in VIEWS else _OTHER
        return self._ways.setdefault(func, (way, name))

    def _truncate(self, frame: FrameType, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Within torch's `trunc_normal_`: the whole call is put off at its first draw, and its trials are passed by."""
        target = frame.f_locals["tensor"]
        if name in ("normal_", "uniform_") and args[0] is target:
            rest = tuple(frame.f_locals[key] for key in ("mean", "std", "a", "b"))
            self.pending.setdefault(_place(target), []).append((target.detach(), nn.init.trunc_normal_, rest, {}))
            return target
        if name in _TRIALS:
            return args[0] if name.endswith("_") and not name.startswith("__") else torch.zeros((), dtype=torch.bool)
        return func(*args, **kwargs)

    def _place_to_wait(self, way: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The storage of what is to be changed, where that can be put off."""
        target: Any = args[0] if args else None
        if type(target) not in PLAIN or target.is_meta or target.layout is not torch.strided:
            return None
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, (torch.Tensor, torch.Generator, list, tuple)):
                return None  # a generator of the model's own has to be drawn from in its turn
        place = int(target.untyped_storage().data_ptr())
        return place if way == _FILL or place in self.pending else None

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


_TRUNCATE = getattr(getattr(nn.init, "_no_grad_trunc_normal_", None), "__code__", None)
_TRIALS = frozenset(
    "copy_ sub_ div_ pow_ mul_ add_ uniform_ normal_ log_ erfinv_ clamp_ gt lt __gt__ __lt__ any".split()
)


def _truncating() -> FrameType | None:
    """The frame of torch's `trunc_normal_` that calls, unless it draws from a generator of its own."""
    frame = sys._getframe(2)
    if frame.f_code is not _TRUNCATE or frame.f_locals.get("generator") is not None:
        return None
    target = frame.f_locals["tensor"]
    return frame if type(target) in (torch.Tensor, nn.Parameter) and target.layout is torch.strided else None


class Built:
    """A model fresh from its factory, with what was put off."""

    def __init__(self, model: nn.Module, mode: _PutOff) -> None:
        self.model = model
        self._mode = mode

    def finish(self, filled: Iterable[torch.Tensor]) -> None:
        """Initialise, in the order of `__init__`, all that is not among the tensors to be filled."""
        done = {id(tensor) for tensor in filled}
        held = [t for m in self.model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
        dense = [t for t in held if t is not None and not t.is_meta and t.layout is torch.strided and not is_lazy(t)]
        skip = {_place(t) for t in dense if id(t) in done}
        skip -= {_place(t) for t in dense if id(t) not in done}  # views of one memory, of which some stay
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
