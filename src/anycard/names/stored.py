"""Walk what a file holds: every tensor by full path, every state dict, every whole model. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits
from anycard.names.paths import join
from anycard.names.wrappers import Wrapper, wrapper_of
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

# Keys of a training checkpoint below which no state dict of a model lies.
_NOT_WEIGHTS = (
    "optimizer", "optim", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler", "callbacks",
    "loops", "scaler", "grad_scaler", "amp", "hyper_parameters", "hparams",
)  # fmt: skip
# Keys that hold a state dict, whatever lies beside them.
_HOLDERS = frozenset(
    [
        "model",
        "state_dict",
        "model_state_dict",
        "state",
        "net",
        "network",
        "weights",
        "params",
        "ema",
        "model_ema",
        "ema_state_dict",
        "generator",
        "discriminator",
        "student",
        "teacher",
        "module",
        "backbone",
        "encoder",
        "decoder",
    ]
)


@dataclass
class StateDict:
    """One candidate: the tensors below one place of a file.

    Attributes:
        key: Full path of the place (`"state_dict"`), "" for the whole file.
        tensors: Stored name, relative to `key` -> tensor.
        canonical: Stored name -> canonical name, where the class names of a whole model tell; else None.
        metadata: Module path -> what `_metadata` says of it (`{"version": 2}`).
        extras: Entries that are no tensors (extra state), by stored name.
        wrappers: Wrapper class or segment names that a whole model shows.
    """

    key: str
    tensors: dict[str, TensorInfo]
    canonical: dict[str, str] | None = None
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: dict[str, object] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    shadow: str | None = None  # a `state_dict` attribute that hides the method


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


def wrapped_module(obj: object) -> object | None:
    """The module among the arguments of a call that wraps it (a compiled model)."""
    if isinstance(obj, Inert) and module_state(obj) is None:
        return next((arg for arg in obj.args if module_state(arg) is not None or wrapped_module(arg)), None)
    return None


def inert_wrapper(obj: Inert) -> Wrapper | None:
    """The wrapper table's row for a pickled module."""
    return wrapper_of([f"{type(obj).module}.{type(obj).name}"])


def module_tensors(
    root: object, *, everything: bool = False
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], object]]:
    """Every entry of a pickled module's state dict: stored path, canonical path, tensor (or extra).

    With `everything`, non-persistent buffers too.
    """
    stack: list[tuple[object, tuple[str, ...], tuple[str, ...], frozenset[int]]] = [(root, (), (), frozenset())]
    while stack:
        obj, stored, canonical, above = stack.pop()
        if id(obj) in above or len(stored) > DEFAULT.depth:
            continue
        inner = wrapped_module(obj)
        if inner is not None:
            stack.append((inner, (*stored, "_orig_mod"), canonical, above | {id(obj)}))
            continue
        state = module_state(obj)
        if state is None:
            continue
        row = inert_wrapper(obj) if isinstance(obj, Inert) else None
        hidden = state.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, value in _items(state.get(group)):
                if isinstance(value, TensorInfo) and (everything or group == "_parameters" or name not in hidden):
                    yield (*stored, name), (*canonical, name), value
        below = above | {id(obj)}
        for name, child in reversed(list(_items(state["_modules"]))):
            inward = canonical if row is not None and name == row.child else (*canonical, name)
            stack.append((child, (*stored, name), inward, below))


def _items(mapping: object) -> Iterator[tuple[str, object]]:
    if isinstance(mapping, Mapping):
        for name, value in mapping.items():
            yield str(name), value


@dataclass
class Contents:
    """What a walk over a file's object finds.

    Attributes:
        tensors: Full path -> tensor.
        objects: Full path -> anything else that is a leaf (plain data, inert stubs).
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)


def contents(tree: object, limits: Limits = DEFAULT) -> Contents:
    """Every tensor and every other leaf of a file's object, by full path.

    Raises:
        FormatError: More nodes or deeper nesting than `limits` allow.
    """
    found = Contents()
    stack: list[tuple[str, object, tuple[int, ...]]] = [("", tree, ())]
    nodes = 0
    while stack:
        path, obj, above = stack.pop()
        nodes += 1
        if nodes > limits.nodes:
            raise FormatError(f"the file's object has more than {limits.nodes:,} parts (a bomb?)")
        if isinstance(obj, TensorInfo):
            found.tensors[path] = obj
            continue
        children = list(_children(obj))
        if not children:
            if not (isinstance(obj, Inert) and module_state(obj) is not None):
                found.objects[path] = obj
            continue
        if id(obj) in above:
            continue
        if len(above) > limits.depth:
            raise FormatError(f"the file's object is nested deeper than {limits.depth} levels at {path[:200]}")
        if isinstance(obj, Inert):
            found.objects[path] = obj
        inside = (*above, id(obj))
        stack.extend((join(path, name), child, inside) for name, child in reversed(children))
    return found


def _children(obj: object) -> Iterator[tuple[str, object]]:
    if isinstance(obj, Mapping):
        yield from ((str(name), value) for name, value in obj.items())
    elif isinstance(obj, (list, tuple)):
        yield from ((str(index), value) for index, value in enumerate(obj))
    elif isinstance(obj, Inert):
        yield from _inert_children(obj)


def _inert_children(obj: Inert) -> Iterator[tuple[str, object]]:
    state = module_state(obj)
    if state is not None:
        for group in ("_parameters", "_buffers", "_modules"):
            yield from ((name, value) for name, value in _items(state.get(group)) if value is not None)
        yield from ((n, v) for n, v in _items(state) if not n.startswith("_") and isinstance(v, (TensorInfo, Mapping)))
        return
    inner = wrapped_module(obj)
    if inner is not None:
        yield "_orig_mod", inner
        return
    inside: object = obj.state
    if isinstance(inside, Mapping):
        yield from _items(inside)
    elif isinstance(inside, (list, tuple)):
        yield from ((str(index), value) for index, value in enumerate(inside))
    yield from ((str(index), value) for index, value in enumerate((*obj.args, *obj.items)))
    yield from ((str(key), value) for key, value in obj.pairs)


def state_dicts(tree: object, lightning: bool = False) -> list[StateDict]:
    """The state dicts that a file holds, by structure alone, in the file's order."""
    found: list[StateDict] = []
    _descend(tree, "", found, depth=0, known=True)
    if not found and contents(tree).tensors:
        found.append(_from_mapping(tree, ""))
    return found


def _descend(obj: object, key: str, found: list[StateDict], depth: int, known: bool) -> None:
    if module_state(obj) is not None or wrapped_module(obj) is not None:
        found.append(_from_module(obj, key))
    elif isinstance(obj, (list, tuple)) and depth < 3:
        for index, value in enumerate(obj):
            if isinstance(value, (Mapping, Inert)):
                _descend(value, join(key, str(index)), found, depth + 1, known=False)
    elif isinstance(obj, Mapping):
        _descend_mapping(obj, key, found, depth, known)


def _descend_mapping(obj: Mapping[Any, Any], key: str, found: list[StateDict], depth: int, known: bool) -> None:
    direct = sum(isinstance(value, TensorInfo) for value in obj.values())
    inner = {str(name): value for name, value in obj.items() if _may_hold(str(name), value) and contents(value).tensors}
    if not direct and not inner:
        return
    if _is_training_level(obj, direct, inner, known):
        for name, value in inner.items():
            _descend(value, join(key, name), found, depth + 1, known=name in _HOLDERS)
    else:
        found.append(_from_mapping(obj, key))


def _is_training_level(obj: Mapping[Any, Any], direct: int, inner: dict[str, object], known: bool) -> bool:
    """The mapping holds state dicts, rather than being one."""
    if not inner:
        return False
    if any(name in _HOLDERS or module_state(value) is not None for name, value in inner.items()):
        return not any("." in str(n) for n, v in obj.items() if isinstance(v, TensorInfo))
    if direct:
        return False
    beside = [name for name, value in obj.items() if str(name) not in inner and not isinstance(value, TensorInfo)]
    return bool(beside) or not known or not _nested_only(inner)


def _nested_only(inner: dict[str, object]) -> bool:
    """One nested dict of dicts, as Megatron splits a state dict; not several state dicts."""
    return len(inner) == 1 and not any(
        isinstance(value, TensorInfo) for held in inner.values() if isinstance(held, Mapping) for value in held.values()
    )


def _may_hold(name: str, value: object) -> bool:
    if not isinstance(value, (Mapping, Inert, list, tuple)) or name.endswith("_extra_state"):
        return False
    if isinstance(value, Mapping) and {"state", "param_groups"} <= set(map(str, value)):
        return False
    if isinstance(value, (list, tuple)) and not any(isinstance(v, (Mapping, Inert)) for v in value):
        return False
    lower = name.lower()
    return not (lower in _NOT_WEIGHTS or lower.startswith(("optim", "lr_sched")) or "rng" in lower)


def _from_mapping(obj: object, key: str) -> StateDict:
    found = contents(obj)
    extras = {n: v for n, v in _items(obj) if n.endswith("_extra_state") and not isinstance(v, TensorInfo)}
    tensors = found.tensors
    for name in extras:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(name + ".")}
    return StateDict(key, tensors, metadata=_metadata(obj), extras=extras)


def _metadata(obj: object) -> dict[str, dict[str, Any]]:
    held = getattr(obj, "__dict__", {}).get("_metadata") if isinstance(obj, dict) else None
    return {path: _plain_keys(value) for path, value in _items(held) if isinstance(value, Mapping)}


def _plain_keys(held: Mapping[Any, Any]) -> dict[str, Any]:
    """Names and plain values, as torch's modules keep their versions; anything else is left out."""
    kept: dict[str, Any] = {}
    for name, value in held.items():
        if isinstance(value, Mapping):
            kept[str(name)] = {str(k): v for k, v in value.items() if isinstance(v, (str, int, float, bool))}
        elif isinstance(value, (str, int, float, bool)):
            kept[str(name)] = value
    return kept


def _from_module(obj: object, key: str) -> StateDict:
    tensors: dict[str, TensorInfo] = {}
    canonical: dict[str, str] = {}
    for stored, name, value in module_tensors(obj):
        if isinstance(value, TensorInfo):
            tensors[".".join(stored)] = value
            canonical[".".join(stored)] = ".".join(name)
    wrappers = tuple(dict.fromkeys(_wrapper_names(obj)))
    return StateDict(key, tensors, canonical, wrappers=wrappers, shadow=_shadow(obj, key))


def _wrapper_names(obj: object) -> Iterator[str]:
    inner = wrapped_module(obj)
    while inner is not None:
        yield str(type(obj).name) if isinstance(obj, Inert) else "call"
        obj, inner = inner, wrapped_module(inner)
    stack = [obj]
    seen: set[int] = set()
    while stack:
        at = stack.pop()
        state = module_state(at)
        if state is None or id(at) in seen or not isinstance(at, Inert):
            continue
        seen.add(id(at))
        if inert_wrapper(at) is not None:
            yield type(at).name
        stack.extend(child for _, child in _items(state["_modules"]))


def _shadow(obj: object, key: str) -> str | None:
    state = module_state(obj)
    if state is not None and isinstance(state.get("state_dict"), Mapping):
        return join(key, "state_dict")
    return None
