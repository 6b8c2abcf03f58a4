"""One look at a live model before a load: what there is to fill, and who goes about loading in their own way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from anycard.names.paths import join
from anycard.torch.dtypes import PLAIN
from anycard.torch.modules import Walked, class_wrapper, refuse_assigned_state_dict, walk

# Overrides that we have read: batch norms' counter may be missing below version 2.
KNOWN = frozenset({nn.Module._load_from_state_dict, _NormBase._load_from_state_dict})


class Target(NamedTuple):
    """A parameter or persistent buffer of a live model.

    Attributes:
        name: Canonical name.
        module: The module that holds it.
        attribute: Its name there.
        slots: The module's parameters, or its buffers.
        tensor: The tensor that stood there when the model was looked at.
        shape: Its sizes; (-1,) for an uninitialised one of a lazy module, which has none yet.
        dtype: Its dtype.
        plain: It is its elements one after the other in memory of its own on the CPU, and of no class of its own;
            as they are, without a lazy sign or conjugate.
    """

    name: str
    module: nn.Module
    attribute: str
    slots: Mapping[str, torch.Tensor | None]
    tensor: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    plain: bool

    @property
    def now(self) -> torch.Tensor:
        """The tensor that stands there by now."""
        tensor = self.slots[self.attribute]
        assert tensor is not None
        return tensor


_Held = tuple[str, nn.Module, str, Mapping[str, torch.Tensor | None], torch.Tensor]  # a target's first fields


class Columns(NamedTuple):
    """Targets by what is known of them; a model has so many that each step for each of them is felt."""

    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[torch.dtype]
    plain: Sequence[bool]


@dataclass
class Survey:
    """What one look at a model tells.

    Attributes:
        walked: Every module.
        held: Every parameter and persistent buffer of the model; ties come under each name.
        columns: The same.
        own: Those that belong to its wrappers.
        hidden: Canonical names of the non-persistent buffers.
        self_loaders: Modules that do more on load than copy tensors by name.
        extras: Modules with an extra state.
        bare: Every parameter and buffer that has no memory yet: canonical name, tensor, module.
    """

    walked: Walked
    held: list[_Held]
    columns: Columns
    own: list[Target]
    hidden: set[str]
    self_loaders: Walked = ()
    extras: Walked = ()
    bare: Sequence[tuple[str, torch.Tensor, nn.Module]] = ()

    @cached_property
    def targets(self) -> dict[str, Target]:
        """What there is to fill, by its name."""
        return {target.name: target for target in _targets(self.held, self.columns)}

    @property
    def usual(self) -> bool:
        """All there is to it are plain tensors with memory, which a load copies by their names."""
        return all(self.columns.plain) and not (self.own or self.self_loaders or self.extras or self.bare)


class _Habits(NamedTuple):
    """What a module class does on load: names of a wrapper's own buffers, or None for no wrapper; and the rest."""

    wrapper: tuple[str, ...] | None
    loads_itself: bool
    extra_state: bool


def survey(model: nn.Module) -> Survey:
    """Look at every module and tensor once.

    Raises:
        CheckpointError: `model.state_dict` was overwritten by an assignment.
    """
    walked = walk(model)
    habits = {kind: _habits(kind) for kind in {type(row[2]) for row in walked}}
    special = {kind for kind, habit in habits.items() if habit != (None, False, False)}
    everything: list[_Held] = []
    hidden: set[str] = set()
    apart: list[tuple[str, str, nn.Module]] = []
    for row in walked:
        _, path, module = row
        slots = module._parameters
        for name, tensor in slots.items():
            if tensor is not None:
                everything.append((f"{path}.{name}" if path else name, module, name, slots, tensor))
        if module._buffers:
            _look_at_buffers(path, module, everything, hidden)
        hooked = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
        if hooked or type(module) in special or _has_entries(module.__dict__):
            apart.append(row)
    refuse_assigned_state_dict(apart, walked)
    held = [row for row in everything if not _passes(row)] if hidden else everything
    own: list[_Held] = []
    if any(habit.wrapper for habit in habits.values()):
        own = [row for row in held if row[2] in (habits[type(row[1])].wrapper or ()) and row[3] is row[1]._buffers]
        mine = set(map(id, own))
        held = [row for row in held if id(row) not in mine]
    columns = _columns(held)
    found = Survey(walked, held, columns, _targets(own, _columns(own)), hidden)
    found.extras = [row for row in apart if habits[type(row[2])].extra_state or "set_extra_state" in vars(row[2])]
    odd: set[int] = set()
    if hidden or own or not all(columns.plain):
        odd = {id(row[1]) for row in everything if type(row[4]) not in PLAIN}
        found.bare = [(row[0], row[4], row[1]) for row in everything if row[4].is_meta]
    found.self_loaders = [row for row in (walked if odd else apart) if _loads_itself(row[2], habits[type(row[2])], odd)]
    return found


def _has_entries(own: Mapping[str, Any]) -> bool:
    """A method that saves or loads was replaced on the module itself."""
    return "state_dict" in own or "_load_from_state_dict" in own or "set_extra_state" in own


def _look_at_buffers(path: str, module: nn.Module, everything: list[_Held], hidden: set[str]) -> None:
    slots = module._buffers
    for name, tensor in slots.items():
        if tensor is not None:
            everything.append((join(path, name), module, name, slots, tensor))
    hidden.update(join(path, name) for name in module._non_persistent_buffers_set)


def _passes(row: _Held) -> bool:
    """It is a buffer that is not stored."""
    _, module, name, slots, _ = row
    return slots is module._buffers and name in module._non_persistent_buffers_set


def _columns(held: Sequence[_Held]) -> Columns:
    tensors = [row[4] for row in held]
    strided = torch.strided
    known = {*map(type, tensors)} <= PLAIN
    shapes: list[tuple[int, ...]] = [t.shape if known or not is_lazy(t) else (-1,) for t in tensors]
    plain = [
        (known or type(t) in PLAIN) and t.is_cpu and t.layout is strided and t.is_contiguous() and not t.is_neg()
        for t in tensors
    ]
    dtypes = [t.dtype for t in tensors]
    if any(dtype.is_complex for dtype in set(dtypes)):
        plain = [known and not t.is_conj() for known, t in zip(plain, tensors, strict=True)]
    return Columns([row[0] for row in held], tensors, shapes, dtypes, plain)


def _targets(held: Sequence[_Held], columns: Columns) -> list[Target]:
    rows = zip(held, columns.shapes, columns.dtypes, columns.plain, strict=True)
    return [Target(*row, tuple(shape), dtype, plain) for row, shape, dtype, plain in rows]


def _loads_itself(module: nn.Module, habits: _Habits, odd: Collection[int]) -> bool:
    if habits.wrapper is not None:
        return _has_hooks_of_others(module)
    hooked = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(habits.loads_itself or hooked or "_load_from_state_dict" in vars(module) or id(module) in odd)


def _has_hooks_of_others(wrapper: nn.Module) -> bool:
    """Someone gave a wrapper load hooks; those that it has of itself only mend names."""
    hooks: list[Any] = [*wrapper._load_state_dict_pre_hooks.values(), *wrapper._load_state_dict_post_hooks.values()]
    inner = [getattr(hook, "hook", hook) for hook in hooks]  # torch wraps those that want the module
    functions = [getattr(hook, "func", hook) for hook in inner]
    return any(not str(getattr(function, "__module__", "")).startswith("torch.") for function in functions)


def _habits(kind: type[nn.Module]) -> _Habits:
    row = class_wrapper(kind)  # type: ignore[arg-type]  # mypy takes no class of classes for hashable
    extra_state = kind.set_extra_state is not nn.Module.set_extra_state
    return _Habits(row and row.own, extra_state or kind._load_from_state_dict not in KNOWN, extra_state)
