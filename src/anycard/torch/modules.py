"""Look at a live model: its wrappers, its canonical names, its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.errors import CheckpointError
from anycard.names.paths import join
from anycard.names.wrappers import Wrapper, wrapper_of


@dataclass(eq=False)
class Target:
    """A parameter or persistent buffer of a live model.

    Attributes:
        name: Canonical name.
        module: The module that holds it.
        attribute: Its name there.
        parameter: It stands in `_parameters`, else in `_buffers`.
        own: It belongs to a wrapper (`n_averaged`), not to the model.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: bool
    own: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it is now."""
        held = self.module._parameters if self.parameter else self.module._buffers
        tensor = held[self.attribute]
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes; (-1,) for an uninitialised one of a lazy module, which has none yet."""
        tensor = self.tensor
        return (-1,) if is_lazy(tensor) else tuple(tensor.shape)


def live_wrapper(module: nn.Module) -> Wrapper | None:
    """The wrapper table's row for a live module, by its class and bases."""
    return wrapper_of(f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__)


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module behind outer wrappers."""
    while (row := live_wrapper(module)) is not None and row.child in module._modules:
        inner = module._modules[row.child]
        if inner is None:
            break
        module = inner
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module: live path, canonical path, module. A module met twice comes twice."""
    stack: list[tuple[str, str, nn.Module, tuple[int, ...]]] = [("", "", model, ())]
    while stack:
        live, canonical, module, above = stack.pop()
        if id(module) in above:
            continue
        yield live, canonical, module
        row = live_wrapper(module)
        for name, child in reversed(module._modules.items()):
            if child is None:
                continue
            inward = canonical if row is not None and name == row.child else join(canonical, name)
            stack.append((join(live, name), inward, child, (*above, id(module))))


def targets(model: nn.Module) -> list[Target]:
    """Every parameter and persistent buffer, under its canonical name; ties come under each name."""
    found = []
    for _, canonical, module in walk(model):
        row = live_wrapper(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.append(Target(join(canonical, name), module, name, True))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append(Target(join(canonical, name), module, name, False, row is not None and name in row.own))
    return found


def canonical_paths(model: nn.Module) -> dict[str, str]:
    """Live module path -> canonical module path.

    Activation-checkpoint wrappers hide their own segment from their state dict, so the paths without it count too.
    """
    paths = {live: canonical for live, canonical, _ in walk(model)}
    hidden = "_checkpoint_wrapped_module"
    seen = {".".join(p for p in live.split(".") if p != hidden): canonical for live, canonical in paths.items()}
    return {**seen, **paths}


def live_paths(model: nn.Module) -> dict[str, str]:
    """Canonical module path -> live module path, of the innermost module that has the canonical one."""
    return {canonical: live for live, canonical, _ in walk(model)}


def not_stored(model: nn.Module) -> set[str]:
    """Canonical names of the non-persistent buffers."""
    walked = walk(model)
    return {join(path, name) for _, path, m in walked for name in m._non_persistent_buffers_set}


def on_meta(model: nn.Module) -> list[tuple[str, torch.Tensor, nn.Module]]:
    """Every parameter and buffer that has no memory yet, with its module."""
    found = []
    for _, path, module in walk(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                found.append((join(path, name), tensor, module))
    return found


def refuse_assigned_state_dict(model: nn.Module) -> None:
    """Raise where someone wrote `model.state_dict = loaded` instead of calling `load_state_dict`.

    A method of the same model is let be (an old adapter recipe binds one).
    """
    members = {id(m) for m in model.modules()}
    for live, module in model.named_modules():
        value = vars(module).get("state_dict")
        if value is None:
            continue
        bound = getattr(value, "__self__", None)
        if callable(value) and (bound is None or id(bound) in members):
            continue
        where = f"model.{live}" if live else "model"
        raise CheckpointError(
            f"{where}.state_dict is a {type(value).__name__}, not the method: an assignment such as "
            f"`{where}.state_dict = loaded` loads nothing and hides the method. Mend it with "
            f"`del {where}.state_dict`, then load with `anycard.load(path, model)`.",
            name=live or None,
        )
