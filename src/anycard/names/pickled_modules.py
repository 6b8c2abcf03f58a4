"""Pickled `nn.Module`s as inert data: their tensors, their children, their wrappers. No class is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anycard.errors import FormatError
from anycard.limits import DEFAULT
from anycard.names.wrappers import Wrapper, wrapper_of
from anycard.pickles.composite import Composite
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_CALLS = 4  # how deep in the arguments of calls a module is looked for


def module_state(obj: object) -> dict[str, Any] | None:
    """The `__dict__` that a pickled `nn.Module` carries, or None for anything else."""
    if not isinstance(obj, Inert):
        return None
    state: object = obj.state
    if isinstance(state, tuple) and state and isinstance(state[0], dict):
        state = state[0]
    if isinstance(state, dict) and isinstance(state.get("_modules"), dict) and "_parameters" in state:
        return state
    return None


def wrapped_module(obj: object, depth: int = _CALLS) -> Inert | None:
    """The module among the arguments of a call that wraps it (a compiled model)."""
    if not isinstance(obj, Inert) or module_state(obj) is not None or not depth:
        return None
    for arg in obj.args[:8]:
        if isinstance(arg, Inert) and (module_state(arg) is not None or wrapped_module(arg, depth - 1) is not None):
            return arg
    return None


def class_name(obj: Inert) -> str:
    """The name of an object's class; also of one that cloudpickle makes (`_make_skeleton_class(type, name, …)`)."""
    maker = obj.callee
    if not type(obj).name and isinstance(maker, Inert) and type(maker).name == "_make_skeleton_class":
        return maker.args[1] if len(maker.args) > 1 and isinstance(maker.args[1], str) else ""
    return type(obj).name


def is_module(obj: object) -> bool:
    """A pickled module, or a call that wraps one."""
    return module_state(obj) is not None or wrapped_module(obj) is not None


def inert_wrapper(obj: object) -> Wrapper | None:
    """The wrapper table's row for a pickled module."""
    return wrapper_of([f"{type(obj).module}.{type(obj).name}"]) if isinstance(obj, Inert) else None


def children_of(obj: object) -> dict[str, object]:
    """A pickled module's children by name; a call's module is its `_orig_mod`."""
    inner = wrapped_module(obj)
    if inner is not None:
        return {"_orig_mod": inner}
    state = module_state(obj) or {}
    return {str(name): child for name, child in state.get("_modules", {}).items() if child is not None}


def own_tensors(obj: object, *, everything: bool = False) -> Iterator[tuple[str, TensorInfo]]:
    """A pickled module's own parameters and persistent buffers; with `everything`, all of its buffers."""
    state = module_state(obj) or {}
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple, dict)) else ()
    for group in ("_parameters", "_buffers"):
        held = state.get(group)
        for name, value in held.items() if isinstance(held, Mapping) else ():
            if group == "_buffers" and name in hidden and not everything:
                continue
            if isinstance(value, TensorInfo):
                yield str(name), value
            elif isinstance(value, Composite) and value.parts is not None:
                parts = value.parts.items()
                yield from ((f"{name}.{part}", one) for part, one in parts if isinstance(one, TensorInfo))


class Walked:
    """A module on the walk: its stored path, its canonical path, itself, its wrapper row."""

    __slots__ = ("canonical", "obj", "row", "stored")

    def __init__(self, stored: tuple[str, ...], canonical: tuple[str, ...], obj: Inert, row: Wrapper | None) -> None:
        self.stored = stored
        self.canonical = canonical
        self.obj = obj
        self.row = row


def walk_modules(root: object) -> Iterator[Walked]:
    """A pickled module and all below it, parents first; one met twice comes twice.

    Raises:
        FormatError: Modules are shared so often that their paths would never end.
    """
    stack: list[tuple[object, tuple[str, ...], tuple[str, ...], frozenset[int]]] = [(root, (), (), frozenset())]
    seen: set[int] = set()
    again = 0
    while stack:
        obj, stored, canonical, above = stack.pop()
        if id(obj) in above or len(stored) > DEFAULT.depth or not isinstance(obj, Inert):
            continue
        again += id(obj) in seen
        if again > DEFAULT.repeats:
            raise FormatError(f"a module is shared more than {DEFAULT.repeats:,} times (a bomb?)")
        seen.add(id(obj))
        row = inert_wrapper(obj)
        called = wrapped_module(obj) is not None
        yield Walked(stored, canonical, obj, row)
        below = above | {id(obj)}
        for name, child in reversed(children_of(obj).items()):
            inward = called or (row is not None and name == row.child)
            stack.append((child, (*stored, name), canonical if inward else (*canonical, name), below))
