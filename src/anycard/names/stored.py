"""The state dicts in a file, by structure alone: in training checkpoints, whole models, dicts of dicts. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from anycard.names.contents import contents, holds_weights, parts_of
from anycard.names.mappings import entries, items, mapping_of
from anycard.names.paths import join
from anycard.names.pickled_modules import is_module, module_state, own_tensors, walk_modules, wrapped_module
from anycard.pickles.composite import Composite
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_DEEPEST = 6  # levels of dicts in which state dicts are looked for
# Keys of a training checkpoint below which no state dict of a model lies.
_NOT_WEIGHTS = (
    "optimizer", "optim", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler", "callbacks",
    "loops", "scaler", "grad_scaler", "amp", "hyper_parameters", "hparams", "frozen_param_fragments",
)  # fmt: skip
# Keys that hold none where one of the others lies beside them.
_ASIDE = ("metrics", "history", "logs", "message_hub", "sampler", "dataloader")
_WHOLE = frozenset(("model", "state_dict", "model_state_dict", "net", "network", "weights", "params"))
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

Metadata = dict[str, dict[str, Any]]


@dataclass
class StateDict:
    """One candidate: the tensors below one place of a file.

    Attributes:
        key: Full path of the place (`"state_dict"`), "" for the whole file.
        tensors: Stored name, relative to `key` -> tensor.
        canonical: Stored name -> canonical name, where the class names of a whole model tell; else None.
        extras: Entries that are no tensors (extra state), by stored name.
        wrappers: Wrapper class or segment names that a whole model shows.
        own: Stored names that belong to a whole model's wrappers (`n_averaged`), not to the model.
        shadow: Path of a `state_dict` attribute that hides a whole model's method.
        told: Gives `metadata`; called when that is asked for, which hardly anyone does.
        clash: A name that two of the tensors would have, or "".
        held: What stands at the key: a dict, a whole model; None for names below a prefix.
    """

    key: str
    tensors: dict[str, TensorInfo]
    canonical: dict[str, str] | None = None
    extras: dict[str, object] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()
    shadow: str | None = None
    told: Callable[[], Metadata] = dict
    clash: str = ""
    held: object = field(default=None, repr=False, compare=False)

    @cached_property
    def metadata(self) -> Metadata:
        """Module path -> what `_metadata` says of it (`{"version": 2}`)."""
        return self.told()


@dataclass
class Found:
    """The state dicts in a file.

    Attributes:
        dicts: By structure alone, in the file's order.
        unions: For each level that holds several: all of them as one, as where a state dict is split over dicts.
    """

    dicts: list[StateDict] = field(default_factory=list)
    unions: list[StateDict] = field(default_factory=list)


def find_state_dicts(tree: object, *, tensors: bool) -> Found:
    """The state dicts that a file holds.

    Args:
        tensors: There are any tensors in it.

    Raises:
        FormatError: The object is beyond what is real (see `contents`).
    """
    found = Found()
    _descend(tree, "", found, depth=0, known=True)
    if tensors and not found.dicts:
        found.dicts.append(_from_mapping(tree, ""))
    return found


def _descend(obj: object, key: str, found: Found, depth: int, known: bool) -> None:
    if is_module(obj):
        found.dicts.append(_from_module(obj, key))
    elif isinstance(obj, (list, tuple)) and depth < _DEEPEST:
        for index, value in enumerate(obj):
            if isinstance(value, (Mapping, Inert)) and _may_hold("", value):
                _descend(value, join(key, str(index)), found, depth + 1, known=False)
    elif (held := mapping_of(obj)) is not None:
        _descend_mapping(obj, held, key, found, depth, known)


def _descend_mapping(obj: object, mapping: Mapping[Any, Any], key: str, found: Found, depth: int, known: bool) -> None:
    weights = holds_weights(mapping)
    held: dict[str, Any] = dict(entries(mapping))
    if weights and set(map(type, held.values())) == {TensorInfo}:
        found.dicts.append(StateDict(key, held, told=partial(metadata_of, obj), held=obj))
        return
    direct = sum(isinstance(value, TensorInfo) and (weights or not value.is_array) for value in held.values())
    inner = {name: value for name, value in held.items() if _may_hold(name, value) and contents(value).tensors}
    if not direct and not inner:
        return
    if depth < _DEEPEST and _is_training_level(held, direct, inner, known):
        _descend_level(inner, key, found, depth)
        found.unions.append(_from_mapping(inner, key))
    else:
        found.dicts.append(_from_mapping(obj, key))


def _descend_level(inner: dict[str, object], key: str, found: Found, depth: int) -> None:
    """Look into each; what a trainer keeps is left out where a whole model's weights are beside it."""
    below: dict[str, list[StateDict]] = {}
    for name, value in inner.items():
        first = len(found.dicts)
        _descend(value, join(key, name), found, depth + 1, known=name in _HOLDERS)
        below[name] = found.dicts[first:]
        del found.dicts[first:]
    whole = any(name in _WHOLE and dicts for name, dicts in below.items())
    found.dicts += [one for name, dicts in below.items() if not (whole and _is_aside(name, dicts)) for one in dicts]


def _is_aside(name: str, dicts: list[StateDict]) -> bool:
    """Random states, what a trainer logs: also numbers and nothing else."""
    lower = name.lower()
    if name in _HOLDERS:
        return False
    return lower in _ASIDE or "random" in lower or not any(info.shape for one in dicts for info in one.tensors.values())


def _is_training_level(held: dict[str, Any], direct: int, inner: dict[str, object], known: bool) -> bool:
    """The mapping holds state dicts, rather than being one."""
    if not inner:
        return False
    if any(name in _HOLDERS or module_state(value) is not None for name, value in inner.items()):
        return not any("." in name for name, value in held.items() if isinstance(value, TensorInfo))
    if direct:
        return False
    beside = [name for name, value in held.items() if name not in inner and not isinstance(value, TensorInfo)]
    return bool(beside) or not known or not _nested_only(inner)


def _nested_only(inner: dict[str, object]) -> bool:
    """One nested dict of dicts, as Megatron splits a state dict; not several state dicts."""
    parts = [part for held in inner.values() for part in items(mapping_of(held))]
    return len(inner) == 1 and not any(
        isinstance(value, TensorInfo) or _is_beside(name, value) for name, value in parts
    )


def _is_beside(name: str, value: object) -> bool:
    """It shows a training checkpoint: the model in it, or what an optimizer is restored from."""
    apart = isinstance(value, Mapping) and not name.endswith("_extra_state") and not _may_hold(name, value)
    return apart or name in ("model", "state_dict", "model_state_dict")


def _may_hold(name: str, value: object) -> bool:
    if not isinstance(value, (Mapping, Inert, list, tuple)) or name.endswith("_extra_state"):
        return False
    if {"state", "param_groups"} <= (mapping_of(value) or {}).keys():
        return False
    if isinstance(value, (list, tuple)) and not any(isinstance(v, (Mapping, Inert)) for v in value):
        return False
    lower = name.lower()
    return not (lower in _NOT_WEIGHTS or lower.startswith(("optim", "lr_sched")) or "rng" in lower)


def _from_mapping(obj: object, key: str) -> StateDict:
    extras = {n: v for n, v in items(mapping_of(obj)) if n.endswith("_extra_state") and not isinstance(v, TensorInfo)}
    walked = contents(obj)
    tensors = walked.tensors
    for name in extras:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(name + ".")}
    clash = next(iter(walked.clashes), "")
    return StateDict(key, tensors, extras=extras, told=partial(metadata_of, obj), clash=clash, held=obj)


def metadata_of(obj: object) -> Metadata:
    """What a state dict's `_metadata` says, by module path."""
    attributes = obj.attributes if isinstance(obj, Inert) else getattr(obj, "__dict__", None)
    held = attributes.get("_metadata") if isinstance(attributes, Mapping) else None
    return {path: _plain_keys(value) for path, value in items(held) if isinstance(value, Mapping)}


def _plain_keys(held: Mapping[Any, Any]) -> dict[str, Any]:
    """Names and plain values, as torch's modules keep their versions; anything else is left out."""
    if type(held) is dict and len(held) == 1 and type(held.get("version")) is int:
        return held  # as nearly all modules have it
    kept: dict[str, Any] = {}
    for name, value in items(held):
        if isinstance(value, Mapping):
            kept[name] = {k: v for k, v in items(value) if isinstance(v, (str, int, float, bool))}
        elif isinstance(value, (str, int, float, bool)):
            kept[name] = value
    return kept


def _from_module(obj: object, key: str) -> StateDict:
    tensors: dict[str, TensorInfo] = {}
    canonical: dict[str, str] = {}
    own: set[str] = set()
    wrappers: dict[str, None] = {}
    walked = list(walk_modules(obj))
    others = _others([module.obj for module in walked])
    for module in walked:
        if module.row is not None or wrapped_module(module.obj) is not None:
            wrappers[type(module.obj).name or "call"] = None
        inner, found = others.get(id(module.obj)) or ("", own_tensors(module.obj))
        for name, info in found:
            stored = ".".join((*module.stored, name))
            tensors[stored] = info
            canonical[stored] = ".".join((*module.canonical, name.removeprefix(inner)))
            if module.row is not None and name in module.row.own:
                own.add(stored)
    shadow = _shadow(obj, key)
    return StateDict(key, tensors, canonical, wrappers=tuple(wrappers), own=frozenset(own), shadow=shadow, held=obj)


def _others(modules: list[Inert]) -> dict[int, tuple[str, list[tuple[str, TensorInfo]]]]:
    """By `id`, of modules that pickle themselves as something else than their `__dict__`: all of their tensors.

    Before them, the prefix that these have of where the module keeps its state dict.
    """
    others = {id(obj): obj for obj in modules if not is_module(obj)}
    held: dict[int, list[tuple[str, TensorInfo]]] = {}
    if others:
        ids = list(others)
        for path, info in contents(list(others.values())).tensors.items():
            index, _, name = path.partition(".")
            held.setdefault(ids[int(index)], []).append((name, info))
    return {known: (_inner_key(others[known], [name for name, _ in found]), found) for known, found in held.items()}


def _inner_key(obj: object, names: list[str]) -> str:
    key = ""
    for _ in range(_DEEPEST):
        parts = parts_of(obj)
        if any(isinstance(value, (TensorInfo, Composite)) for _, value in parts):
            break
        inner = [(n, v) for n, v in parts if all(name.startswith(f"{key}{n}.") for name in names)]
        if len(inner) != 1:
            break
        key, obj = f"{key}{inner[0][0]}.", inner[0][1]
    return key


def _shadow(obj: object, key: str) -> str | None:
    state = module_state(obj)
    if state is not None and isinstance(state.get("state_dict"), Mapping):
        return join(key, "state_dict")
    return None
