"""Look at a live model: its wrappers, its modules and their canonical names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import nn

from anycard.errors import CheckpointError
from anycard.names.paths import join
from anycard.names.wrappers import Wrapper, wrapper_of

Walked = Sequence[tuple[str, str, nn.Module]]  # live path, canonical path, module


@lru_cache(maxsize=1024)  # a model has many modules of few classes
def class_wrapper(kind: type[nn.Module]) -> Wrapper | None:
    """The wrapper table's row for a module class, by itself and its bases."""
    return wrapper_of(f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__)


def live_wrapper(module: nn.Module) -> Wrapper | None:
    """The wrapper table's row for a live module."""
    return class_wrapper(type(module))  # type: ignore[arg-type]  # mypy takes no class of classes for hashable


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
    found: list[tuple[str, str, nn.Module]] = [("", "", model)]
    stack = [_Level("", "", model)]
    inside = {id(model)}
    while stack:
        level = stack[-1]
        live, canonical, inner = level.live, level.canonical, level.inner
        for name, child in level.children:
            if child is None:
                continue
            path = f"{live}.{name}" if live else name
            if name == inner:
                own = canonical
            else:
                own = path if canonical is live else join(canonical, name)
            if not child._modules:  # most have none, and take no level of their own
                found.append((path, own, child))
            elif id(child) not in inside:
                found.append((path, own, child))
                inside.add(id(child))
                stack.append(_Level(path, own, child))
                break
        else:
            inside.discard(id(level.module))
            stack.pop()
    return found


class _Level:
    """A module whose children are being walked; `inner`: which of them takes its place, where it is a wrapper."""

    def __init__(self, live: str, canonical: str, module: nn.Module) -> None:
        self.live, self.canonical, self.module = live, canonical, module
        self.children = iter(module._modules.items())
        row = live_wrapper(module)
        self.inner = row.child if row is not None else None


def children_first(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, in the order in which a load is done with them; one met twice comes twice."""
    below = [inner for child in module._modules.values() if child is not None for inner in children_first(child)]
    return [*below, module]


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


def refuse_assigned_state_dict(rows: Walked, walked: Walked) -> None:
    """Raise where someone wrote `model.state_dict = loaded` instead of calling `load_state_dict`.

    A method of the same model is let be (an old adapter recipe binds one).

    Args:
        rows: Those of `walked` to look at.
    """
    for live, _, module in [row for row in rows if "state_dict" in row[2].__dict__]:
        value = module.__dict__["state_dict"]
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
