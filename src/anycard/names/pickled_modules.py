"""Pickled `nn.Module`s as inert data: their tensors, their children, their wrappers. No class is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeGuard

from anycard.errors import FormatError
from anycard.limits import DEFAULT
from anycard.names.wrappers import Wrapper, wrapper_of
from anycard.pickles.brief import key_text
from anycard.pickles.composite import Composite, Packed
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_CALLS = 4  # how deep in the arguments of calls a module is looked for
_MOST = 16  # arguments, and entries of one, that are looked at
# What every module keeps, and what says nothing of how it was made.
COMMON = frozenset(("training", "call_super_init", "dump_patches"))
# The tuple that a quantised convolution is pickled as: torch/ao/nn/quantized/modules/conv.py, _ConvNd.__getstate__.
_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode", "weight", "bias", "scale", "zero_point", "training",
)  # fmt: skip
_CLASS_NAMES = ("class_name", "_graphmodule_cls_name")


def module_state(obj: object) -> Mapping[str, Any] | None:
    """The `__dict__` that a pickled `nn.Module` carries, or None for anything else.

    It may be an argument of the call that makes the module, or lie in one: `reduce_graph_module(dict, …)` of
    torch.fx, a rebuilding function of the model's own that takes `{"state": dict, "class_name": …}`.
    """
    if not isinstance(obj, Inert):
        return None
    state: object = obj.state
    if state is not None:
        if isinstance(state, tuple) and state and isinstance(state[0], dict):
            state = state[0]
        if _is_state(state):
            return state
        if isinstance(state, tuple) and len(state) == len(_CONV) and _is_quantised_conv(type(obj)):
            found: Mapping[str, Any] = _once(obj, "state", _conv_state)
            return found
    return _once(obj, "state", _given_state) if obj.called and obj.args else None


def _once(obj: Inert, what: str, look: Callable[[Inert], Any]) -> Any:
    if what not in obj.known:
        obj.known = {**obj.known, what: look(obj)}
    return obj.known[what]


def _given_state(obj: Inert) -> Mapping[str, Any] | None:
    return next((held for held in _given(obj) if _is_state(held)), None)


def _is_quantised_conv(kind: type[Inert]) -> bool:
    path = kind.module.removeprefix("__torch__.")
    return path.startswith(("torch.ao.nn.", "torch.nn.")) and "quantized" in path and "Conv" in kind.name


def _conv_state(obj: Inert) -> Mapping[str, Any]:
    held = dict(zip(_CONV, obj.state, strict=True))
    buffers = {name: held.pop(name) for name in ("weight", "bias")}
    return {**held, "_parameters": {}, "_buffers": buffers, "_modules": {}}


def _is_state(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and isinstance(value.get("_modules"), Mapping) and "_parameters" in value


def _given(obj: Inert, levels: int = 3) -> Iterator[Mapping[Any, Any]]:
    """The mappings among a call's arguments, and in these; not in objects, which may be modules themselves."""
    held: list[object] = list(obj.args[:_MOST])
    for _ in range(levels):
        inner: list[object] = []
        for value in held:
            value = dict(value.pairs) if isinstance(value, Inert) and _is_dict(value) else value
            if isinstance(value, Mapping):
                yield value
                inner += islice(value.values(), _MOST - len(inner))
            elif isinstance(value, (list, tuple)):
                inner += value[: _MOST - len(inner)]
        held = inner


def _is_dict(value: Inert) -> bool:
    """An object of a subclass of dict, with text for keys."""
    return 0 < len(value.pairs) <= _MOST and all(isinstance(name, str) for name, _ in value.pairs)


def wrapped_module(obj: object, depth: int = _CALLS) -> Inert | None:
    """The module among the arguments of a call that wraps it (a compiled model)."""
    if not isinstance(obj, Inert) or not obj.args or not depth or module_state(obj) is not None:
        return None
    found: Inert | None = _once(obj, f"wraps {depth}", lambda obj: _wrapped(obj, depth - 1))
    return found


def _wrapped(obj: Inert, depth: int) -> Inert | None:
    for arg in obj.args[:8]:
        if isinstance(arg, Inert) and (module_state(arg) is not None or wrapped_module(arg, depth) is not None):
            return arg
    return None


def class_name(obj: Inert) -> str:
    """The name of an object's class.

    Also of one that cloudpickle makes (`_make_skeleton_class(type, name, …)`), of one within a class
    (`getattr(outer, name)`), and of one whose name is an argument of the call that makes it, where the call is
    told so at all.
    """
    maker = obj.callee
    if not type(obj).name and isinstance(maker, Inert) and type(maker).name in ("_make_skeleton_class", "getattr"):
        return maker.args[1] if len(maker.args) > 1 and isinstance(maker.args[1], str) else ""
    if obj.called and obj.state is None:
        told = (held.get(key) for held in _given(obj) for key in _CLASS_NAMES)
        kinds = (arg.name for arg in obj.args[:_MOST] if isinstance(arg, type) and issubclass(arg, Inert))
        return next((name for name in (*told, *kinds) if isinstance(name, str)), type(obj).name)
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
    return {key_text(name): child for name, child in state.get("_modules", {}).items() if child is not None}


def own_tensors(obj: object, *, everything: bool = False) -> Iterator[tuple[str, TensorInfo]]:
    """A pickled module's own parameters and persistent buffers; with `everything`, all of its buffers."""
    state = module_state(obj) or {}
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple, dict)) else ()
    packed = {name: value for name, value in state.items() if isinstance(value, Packed)}
    for group in ("_parameters", "_buffers", "packed parameters"):
        held = packed if group == "packed parameters" else state.get(group)
        for name, value in held.items() if isinstance(held, Mapping) else ():
            if group == "_buffers" and name in hidden and not everything:
                continue
            if isinstance(value, TensorInfo):
                yield key_text(name), value
            elif isinstance(value, Composite) and value.parts is not None:
                parts = value.parts.items()
                yield from ((f"{key_text(name)}.{part}", one) for part, one in parts if isinstance(one, TensorInfo))


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
