"""One look at a live model before a load: what there is to fill, and who goes about loading in their own way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

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
        parameter: It stands in `_parameters`, else in `_buffers`.
        own: It belongs to a wrapper (`n_averaged`), not to the model.
        tensor: The tensor that stood there when the model was looked at.
        shape: Its sizes; (-1,) for an uninitialised one of a lazy module, which has none yet.
        dtype: Its dtype.
        plain: It is its elements one after the other in memory of its own on the CPU, and of no class of its own;
            as they are, without a lazy sign or conjugate.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: bool
    own: bool
    tensor: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    plain: bool

    @property
    def now(self) -> torch.Tensor:
        """The tensor that stands there by now."""
        held = self.module._parameters if self.parameter else self.module._buffers
        tensor = held[self.attribute]
        assert tensor is not None
        return tensor


@dataclass
class Survey:
    """What one look at a model tells; a model has so many tensors that each look at all of them is felt.

    Attributes:
        walked: Every module.
        targets: Every parameter and persistent buffer of the model, by its name; ties come under each name.
        own: Those that belong to its wrappers.
        self_loaders: Modules that do more on load than copy tensors by name.
        extras: Modules with an extra state.
        hidden: Canonical names of the non-persistent buffers.
        bare: Every parameter and buffer that has no memory yet: canonical name, tensor, module.
    """

    walked: Walked
    targets: dict[str, Target] = field(default_factory=dict)
    own: list[Target] = field(default_factory=list)
    self_loaders: list[tuple[str, str, nn.Module]] = field(default_factory=list)
    extras: list[tuple[str, str, nn.Module]] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    bare: list[tuple[str, torch.Tensor, nn.Module]] = field(default_factory=list)


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
    refuse_assigned_state_dict(model, walked)
    habits = {kind: _habits(kind) for kind in {type(module) for _, _, module in walked}}
    found = Survey(walked)
    held: list[_Held] = []
    passing: list[_Held] = []
    for _, path, module in walked:
        prefix = f"{path}." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                held.append((prefix + name, module, name, True, False, tensor))
        if module._buffers:
            own = habits[type(module)].wrapper or ()
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    rows = passing if name in module._non_persistent_buffers_set else held
                    rows.append((prefix + name, module, name, False, name in own, buffer))
            found.hidden.update(prefix + name for name in module._non_persistent_buffers_set)
    targets = _targets(held)
    found.targets = {target.name: target for target in targets if not target.own}
    found.own = [target for target in targets if target.own]
    found.bare = [(row[0], row[5], row[1]) for row in (*held, *passing) if row[5].is_meta]
    odd = {id(row[1]) for row in (*held, *passing) if type(row[5]) not in PLAIN}
    found.extras = [row for row in walked if habits[type(row[2])].extra_state]
    found.self_loaders = [row for row in walked if _loads_itself(row[2], habits[type(row[2])], odd)]
    return found


_Held = tuple[str, nn.Module, str, bool, bool, torch.Tensor]  # as the first of a target's fields


def _targets(held: Sequence[_Held]) -> list[Target]:
    if not held:
        return []
    *columns, tensors = zip(*held, strict=True)
    strided = torch.strided
    known = {*map(type, tensors)} <= PLAIN
    shapes = [tuple(t.shape) if known or not is_lazy(t) else (-1,) for t in tensors]
    plain = [
        type(t) in PLAIN and t.is_cpu and t.layout is strided and t.is_contiguous() and not t.is_neg() for t in tensors
    ]
    dtypes = [t.dtype for t in tensors]
    if any(dtype.is_complex for dtype in set(dtypes)):
        plain = [known and not t.is_conj() for known, t in zip(plain, tensors, strict=True)]
    made = partial(tuple.__new__, Target)  # a third of the time of calls of the class
    return list(map(made, zip(*columns, tensors, shapes, dtypes, plain, strict=True)))


def _loads_itself(module: nn.Module, habits: _Habits, odd: Collection[int]) -> bool:
    if habits.wrapper is not None:
        return False
    hooked = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(habits.loads_itself or hooked or id(module) in odd)


def _habits(kind: type[nn.Module]) -> _Habits:
    row = class_wrapper(kind)  # type: ignore[arg-type]  # mypy takes no class of classes for hashable
    extra_state = kind.set_extra_state is not nn.Module.set_extra_state
    return _Habits(row and row.own, extra_state or kind._load_from_state_dict not in KNOWN, extra_state)
