"""Look at a live model: its wrappers, its canonical names, its parameters and buffers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.errors import CheckpointError
from anycard.names.paths import join
from anycard.names.wrappers import Wrapper, wrapper_of


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
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: bool
    own: bool
    tensor: torch.Tensor
    shape: tuple[int, ...]

    @property
    def now(self) -> torch.Tensor:
        """The tensor that stands there by now."""
        held = self.module._parameters if self.parameter else self.module._buffers
        tensor = held[self.attribute]
        assert tensor is not None
        return tensor


Walked = Sequence[tuple[str, str, nn.Module]]  # live path, canonical path, module


@lru_cache(maxsize=1024)  # a model has many modules of few classes
def _row_of(kind: type[nn.Module]) -> Wrapper | None:
    return wrapper_of(f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__)


def live_wrapper(module: nn.Module) -> Wrapper | None:
    """The wrapper table's row for a live module, by its class and bases."""
    return _row_of(type(module))  # type: ignore[arg-type]  # mypy takes no class of classes for hashable


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module behind outer wrappers."""
    while (row := live_wrapper(module)) is not None and row.child in module._modules:
        inner = module._modules[row.child]
        if inner is None:
            break
        module = inner
    return module


def walk(model: nn.Module) -> Walked:
    """Every module: live path, canonical path, module. A module met twice comes twice."""
    found: list[tuple[str, str, nn.Module]] = []
    stack: list[tuple[str, str, nn.Module, frozenset[int]]] = [("", "", model, frozenset())]
    while stack:
        live, canonical, module, above = stack.pop()
        if id(module) in above:
            continue
        found.append((live, canonical, module))
        if not module._modules:
            continue
        row = live_wrapper(module)
        inside = above | {id(module)}
        for name, child in reversed(module._modules.items()):
            if child is not None:
                inward = canonical if row is not None and name == row.child else join(canonical, name)
                stack.append((join(live, name), inward, child, inside))
    return found


def targets(walked: Walked) -> list[Target]:
    """Every parameter and persistent buffer, under its canonical name; ties come under each name."""
    found = []
    for _, canonical, module in walked:
        prefix = f"{canonical}." if canonical else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.append(Target(prefix + name, module, name, True, False, parameter, _shape(parameter)))
        if module._buffers:
            row = live_wrapper(module)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    own = row is not None and name in row.own
                    found.append(Target(prefix + name, module, name, False, own, buffer, _shape(buffer)))
    return found


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return (-1,) if is_lazy(tensor) else tuple(tensor.shape)


def canonical_paths(walked: Walked) -> dict[str, str]:
    """Live module path -> canonical module path.

    Activation-checkpoint wrappers hide their own segment from their state dict, so the paths without it count too.
    """
    paths = {live: canonical for live, canonical, _ in walked}
    hidden = "_checkpoint_wrapped_module"
    seen = {".".join(p for p in live.split(".") if p != hidden): canonical for live, canonical in paths.items()}
    return {**seen, **paths}


def live_paths(walked: Walked) -> dict[str, str]:
    """Canonical module path -> live module path, of the innermost module that has the canonical one."""
    return {canonical: live for live, canonical, _ in walked}


def not_stored(walked: Walked) -> set[str]:
    """Canonical names of the non-persistent buffers."""
    return {join(path, name) for _, path, m in walked for name in m._non_persistent_buffers_set}


def on_meta(walked: Walked) -> list[tuple[str, torch.Tensor, nn.Module]]:
    """Every parameter and buffer that has no memory yet, with its module."""
    found = []
    for _, path, module in walked:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                found.append((join(path, name), tensor, module))
    return found


def refuse_assigned_state_dict(model: nn.Module, walked: Walked | None = None) -> None:
    """Raise where someone wrote `model.state_dict = loaded` instead of calling `load_state_dict`.

    A method of the same model is let be (an old adapter recipe binds one).
    """
    walked = walk(model) if walked is None else walked
    for live, _, module in walked:
        value = module.__dict__.get("state_dict")
        if value is None:
            continue
        bound = getattr(value, "__self__", None)
        if callable(value) and (bound is None or any(bound is member for _, _, member in walked)):
            continue
        where = f"model.{live}" if live else "model"
        raise CheckpointError(
            f"{where}.state_dict is a {type(value).__name__}, not the method: an assignment such as "
            f"`{where}.state_dict = loaded` loads nothing and hides the method. Mend it with "
            f"`del {where}.state_dict`, then load with `anycard.load(path, model)`.",
            name=live or None,
        )
