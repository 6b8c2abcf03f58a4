"""What today's classes keep and an older version did not: a rebuilt module gets it, or is told to lack it.

No `__init__` runs: its bytecode says what it sets, `self.name = parameter` with the parameter's default or
`self.name = constant`. What torch's own classes compute stands in a table.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.loss import _Loss

_OPAQUE = object()  # what is set is computed
_REQUIRED = object()  # what is set is a parameter without a default


class Lack(NamedTuple):
    """An attribute that a module should have today, and whether its class's `__init__` asks its caller for it."""

    path: str
    required: bool


def prepare(kind: type, state: Any) -> Any:
    """A state that the class's own `__setstate__` can take: a recurrent layer wants its weights in a row since 1.4."""
    if not issubclass(kind, nn.RNNBase) or not isinstance(state, dict) or "_flat_weights" in state:
        return state
    names = [name for layer in state.get("_all_weights", ()) for name in layer if isinstance(name, str)]
    weights = [state["_parameters"].get(name) for name in names]
    return {"_flat_weights_names": names, **state, "_flat_weights": weights}


def complete(module: nn.Module) -> list[Lack]:
    """Give a rebuilt module the attributes that came later; what has no default is left out, and returned."""
    held = vars(module)
    for name, value in vars(nn.Module()).items():
        if name not in held:
            held[name] = copy.copy(value)
    for kind, name, make in _COMPUTED:
        if isinstance(module, kind) and not _has(module, name):
            make(module)
    lacks = []
    own: Any = type(module)
    for name, value in _set_by_init(own).items():
        if _has(module, name):
            continue
        if value is _OPAQUE or value is _REQUIRED:
            required = value is _REQUIRED and not _chooses_its_state(own)
            lacks.append(Lack(f"{own.__name__}.{name}", required))
        else:
            setattr(module, name, copy.copy(value))
    return lacks


def _chooses_its_state(kind: type) -> bool:
    """The class itself says what is pickled of it, and may have left out what its `__init__` asks for."""
    own = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    return any(name in vars(base) for base in own for name in ("__getstate__", "__reduce__", "__reduce_ex__"))


def _has(module: nn.Module, name: str) -> bool:
    groups = (vars(module), module._parameters, module._buffers, module._modules)
    return any(name in group for group in groups) or inspect.getattr_static(type(module), name, None) is not None


@cache
def _set_by_init(kind: type[nn.Module]) -> dict[str, Any]:
    """What every `__init__` of the class sets whatever its arguments, where a method of the class reads it."""
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    functions = [f for base in own for f in vars(base).values() if inspect.isfunction(f)]
    read = {name for f in functions if f.__name__ != "__init__" for name in f.__code__.co_names}
    defaults: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for base in own:
        init = vars(base).get("__init__")
        if not inspect.isfunction(init):
            continue
        for parameter in inspect.signature(init).parameters.values():
            given = _REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
            defaults.setdefault(parameter.name, given)
        for name, value in _stores(init):
            if name in read:
                found.setdefault(name, defaults.get(value.name, _REQUIRED) if isinstance(value, _Local) else value)
    return found


class _Local(NamedTuple):
    """A local variable of the function."""

    name: str


def _stores(init: FunctionType) -> Iterator[tuple[str, Any]]:
    """`self.name = value` outside of branches: name, and a `_Local`, a constant or _OPAQUE."""
    code = init.__code__
    me, parameters = code.co_varnames[0], {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    changed = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_FAST"}
    branch_end = 0
    pushed: list[Any] = [_OPAQUE, _OPAQUE]
    for step in dis.get_instructions(code):
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            branch_end = max(branch_end, int(step.argval))
        if step.opname == "STORE_ATTR" and step.offset >= branch_end and pushed[-1] == _Local(me):
            value = pushed[-2]
            plain = not isinstance(value, _Local) or (value.name in parameters and value.name not in changed)
            yield step.argval, value if plain else _OPAQUE
        pushed += _pushes(step)


def _pushes(step: dis.Instruction) -> list[Any]:
    """What an instruction leaves on the stack, as far as `self.name = value` needs it; two loads may be one."""
    if step.opname.startswith("LOAD_FAST"):
        return [_Local(name) for name in (step.argval if isinstance(step.argval, tuple) else (step.argval,))]
    if step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
        return [step.argval]
    return [_OPAQUE]


# What torch's own classes compute. Class, attribute, what sets it.


def _activation(module: Any) -> None:
    """Below 1.12; neither, where it is something else: the layer then takes its general path."""
    relu = isinstance(module.activation, nn.ReLU) or module.activation is nn.functional.relu
    gelu = isinstance(module.activation, nn.GELU) or module.activation is nn.functional.gelu
    module.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def _reduction(module: Any) -> None:
    """Below 0.4.1 a loss kept two booleans."""
    held = vars(module)
    old = held.get("size_average"), held.get("reduce")
    module.reduction = nn._reduction.legacy_get_string(*old, emit_warning=False)


def _batches(module: Any) -> None:
    """Below 0.4.1 a batch norm counted no batches."""
    tracked = vars(module).setdefault("track_running_stats", module._buffers.get("running_mean") is not None)
    module.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)


def _no_padding(module: Any) -> None:
    """Below 1.9."""
    module.padding_idx = None


def _size(module: Any) -> None:
    module._size = len(module._parameters)


def _keys(module: Any) -> None:
    module._keys = dict.fromkeys(module._parameters)


_COMPUTED: tuple[tuple[type[nn.Module], str, Callable[[Any], None]], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", _activation),
    (_Loss, "reduction", _reduction),
    (_NormBase, "num_batches_tracked", _batches),
    (nn.EmbeddingBag, "padding_idx", _no_padding),
    (nn.ParameterList, "_size", _size),  # below 1.12, as ParameterDict's keys
    (nn.ParameterDict, "_keys", _keys),
)
