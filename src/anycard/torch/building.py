"""Run a model's factory without the initialisation that a load would overwrite.

A `TorchFunctionMode` (local to this thread) puts off every draw into fresh memory, and what follows
it in place by plain values only (`mul_`, `zero_`, …), per storage and in order. Before anything that is
not known to be harmless is given such a storage, what was put off is done; so what `__init__` computes
comes out right. After the load, `finish` does it for whatever the file did not fill.

Where `__init__` seeds the default generator itself, its draws are done at once, from what it has set.
Scripted functions and other compiled code are not seen, nor are other threads that `__init__` starts. So constants
are never put off by themselves, and a draw is passed by where such code has written since.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # torch.vmap allows no draws
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from anycard.torch.dtypes import PLAIN
from anycard.torch.overrides import ARITHMETIC, DRAWS, METADATA, VIEWS, gives_view, short_name
from anycard.torch.seeding import CallersDraws

_LOOK, _VIEW, _DRAW, _CHANGE, _OTHER = range(5)  # what a function does to a tensor, see `overrides`


@dataclass
class _Step:
    """A change that is put off.

    Attributes:
        target: What is to be changed; shares the counter of its versions.
        version: Which one it was; 0 where there is none, in inference mode.
        call: Function, arguments behind the target, keyword arguments.
    """

    target: torch.Tensor
    version: int
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class _PutOff(TorchFunctionMode):
    """Records initialisations per storage instead of running them.

    Attributes:
        pending: By the address of a storage: what is to be done to it, in order; the first is a draw.
        exposed: Storages that can be read by other ways than torch's functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, list[_Step]] = {}
        self.exposed: set[int] = set()
        self.draws = CallersDraws()
        self._ways: dict[Any, tuple[int, str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        way, name = self._ways.get(func) or self._learn(func)
        kwargs = kwargs or {}
        if way == _LOOK:
            return func(*args, **kwargs)
        if (frame := _truncating()) is not None and self._place_to_draw(frame.f_locals["tensor"]):
            return self._truncate(frame, func, name, args, kwargs)
        if not args and "tensor" in kwargs:  # as torch.nn.init hands its own functions over
            args, kwargs = (kwargs["tensor"],), {k: v for k, v in kwargs.items() if k != "tensor"}
        if (way == _DRAW or (way == _CHANGE and self.pending)) and (place := self._place_alone(way, args, kwargs)):
            if way == _CHANGE and place not in self.pending:  # constants take no time, and unseen code may read them
                return func(*args, **kwargs)
            self._append(place, args[0], func, args[1:], kwargs)
            return args[0]
        if way == _VIEW and gives_view(name, (*args[1:], *kwargs.values())):
            return func(*args, **kwargs)
        read = args[:1] if name == "__deepcopy__" else (*args, *kwargs.values())  # its memo holds half the model
        if self.pending:
            self._settle(read)
        result = func(*args, **kwargs)
        if not isinstance(result, _VALUES) or name == "share_memory_":
            self.exposed.update(_place(value) for value in read if isinstance(value, torch.Tensor))
        return result

    def _learn(self, func: Any) -> tuple[int, str]:
        """What a function does, and its name; a model's factory calls few functions many times."""
        name = short_name(func)
        in_place = name.endswith("_") and not name.endswith("__")
        if name in METADATA:
            way = _LOOK
        elif in_place and name in ARITHMETIC:
            way = _CHANGE
        elif in_place and (name in DRAWS or getattr(func, "__module__", "") == "torch.nn.init"):
            way = _DRAW
        else:
            way = _VIEW if name in VIEWS else _OTHER
        return self._ways.setdefault(func, (way, name))

    def _place_alone(self, way: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The storage of what is to be changed, as `_place_to_wait`, where all else that is given is plain values."""
        for value in (*args[1:], *kwargs.values()):
            if type(value) not in _NUMBERS:
                return 0  # a generator of the model's own, too, has to be drawn from in its turn
        target = args[0] if args else None
        return self._place_to_draw(target) if way == _DRAW else self._place_to_wait(target)

    def _place_to_draw(self, target: Any) -> int:
        """The same, unless `__init__` seeds what it draws here."""
        return 0 if self.draws.are_replaced() else self._place_to_wait(target)

    def _append(self, place: int, target: torch.Tensor, func: Any, rest: tuple[Any, ...], kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():
            step = _Step(target.detach(), _version(target), (func, rest, kwargs))
            self.pending.setdefault(place, []).append(step)

    def _truncate(self, frame: FrameType, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Within torch's `trunc_normal_`: the whole call is put off at its first draw, and its trials are passed by."""
        target = frame.f_locals["tensor"]
        if name in ("normal_", "uniform_") and args[0] is target:
            rest = tuple(frame.f_locals[key] for key in ("mean", "std", "a", "b"))
            self._append(_place(target), target, nn.init.trunc_normal_, rest, {})
            return target
        if name in _TRIALS:
            return args[0] if name.endswith("_") and not name.startswith("__") else torch.zeros((), dtype=torch.bool)
        return func(*args, **kwargs)

    def _place_to_wait(self, target: Any) -> int:
        """The storage of what is to be changed, where only torch's functions can read it; else 0."""
        if type(target) not in PLAIN:
            return 0
        with torch._C.DisableTorchFunction():
            if target.is_meta or target.layout is not torch.strided:
                return 0
            storage = target.untyped_storage()
            place = int(storage.data_ptr())
            return place if storage.resizable() and place not in self.exposed else 0  # numpy's memory is not

    def _settle(self, values: Iterable[Any]) -> None:
        """Do what was put off for all that can be reached from here; for everything, where that cannot be told."""
        for value in values:
            if type(value) in _NUMBERS:
                continue
            if isinstance(value, torch.Tensor):
                self._settle_place(_place(value))
            elif isinstance(value, (list, tuple)):
                self._settle(value)
            elif isinstance(value, dict):
                self._settle(value.values())
            elif isinstance(value, slice):
                self._settle((value.start, value.stop, value.step))
            elif not isinstance(value, _HARMLESS):
                self._settle_place(_ANYWHERE)

    def _settle_place(self, place: int) -> None:
        for each in list(self.pending) if place == _ANYWHERE else (place,) if place in self.pending else ():
            self.run(each)

    def run(self, place: int) -> None:
        """Do what was put off for a storage, unless nobody else has it any more."""
        steps = self.pending.pop(place)
        with _plainly():
            calls = [step.call if _version(step.target) == step.version else None for step in steps]
            targets = _again(steps)
            if targets and any(calls):
                with self.draws.drawn():
                    for target, call in zip(targets, calls, strict=True):
                        if call is not None:
                            func, args, kwargs = call
                            func(target, *args, **kwargs)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _again(steps: list[_Step]) -> list[torch.Tensor]:
    """The steps' targets anew, so that those of inference mode can be written; none where only the steps had them."""
    forms = [(t.dtype, t.device, t.storage_offset(), t.size(), t.stride()) for t in (step.target for step in steps)]
    memory = StorageWeakRef(steps[0].target.untyped_storage())  # type: ignore[no-untyped-call]
    steps.clear()
    storage: Any = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
    if storage is None:
        return []
    return [torch.empty(0, dtype=kind, device=where).set_(storage, *form) for kind, where, *form in forms]


@contextmanager
def _plainly() -> Iterator[None]:
    """Run torch's functions as they are, whatever mode or transform is on."""
    with torch._C.DisableTorchFunction(), torch.no_grad(), temporarily_clear_interpreter_stack():
        yield


_ANYWHERE = -1
_VALUES = (torch.Tensor, bool, float, type(None))  # what else a function gives may lead to the tensor's memory
_NUMBERS = frozenset((int, float, bool, str, type(None), np.float64, np.float32, np.int64, torch.dtype, torch.device))
_HARMLESS = (
    int, float, str, complex, bytes, range, type, type(...), np.generic, np.ndarray,  # arrays' storages are exposed
    torch.layout, torch.memory_format, torch.Generator,
)  # fmt: skip


def _place(tensor: torch.Tensor) -> int:
    """Where its storage is; 0 for none."""
    with torch._C.DisableTorchFunction():
        if is_lazy(tensor) or tensor.is_meta:
            return 0
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
            return _ANYWHERE  # it may hold other tensors
        try:
            return int(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # torch.func's wrap others
            return _ANYWHERE


_TRUNCATE = getattr(getattr(nn.init, "_no_grad_trunc_normal_", None), "__code__", None)
_TRIALS = frozenset(
    "copy_ sub_ div_ pow_ mul_ add_ uniform_ normal_ log_ erfinv_ clamp_ gt lt __gt__ __lt__ any".split()
)


def _truncating() -> FrameType | None:
    """The frame of torch's `trunc_normal_` that calls, unless it draws from a generator of its own."""
    frame = sys._getframe(2)
    return frame if frame.f_code is _TRUNCATE and frame.f_locals.get("generator") is None else None


class Built:
    """A model fresh from its factory, with what was put off."""

    def __init__(self, model: nn.Module, mode: _PutOff) -> None:
        self.model = model
        self._mode = mode

    def finish(self, filled: Iterable[torch.Tensor]) -> None:
        """Initialise, in the order of `__init__`, all that is not among the tensors to be filled."""
        done = {id(tensor) for tensor in filled}
        whole, stays = set(), set()  # there may be views of one memory, of which some are not filled
        for tensor in (t for m in self.model.modules() for t in (*m._parameters.values(), *m._buffers.values())):
            if tensor is None or (place := _place(tensor)) not in self._mode.pending:
                continue
            if id(tensor) not in done:
                stays.add(place)
            elif tensor.nbytes == tensor.untyped_storage().nbytes():
                whole.add(place)
        for place in [p for p in self._mode.pending if p not in whole or p in stays]:
            self._mode.run(place)


def build(factory: Callable[[], Any]) -> Built:
    """Call the factory; nothing is initialised that can wait.

    Raises:
        TypeError: It does not give an `nn.Module`.
    """
    mode = _PutOff()
    with mode.draws.watched(), mode:
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory gave a {type(model).__name__}, not an nn.Module")
    return Built(model, mode)
