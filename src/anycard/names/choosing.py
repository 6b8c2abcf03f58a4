"""Pick the one state dict that is meant, and give its tensors their canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from anycard.errors import ChoiceError, FormatError
from anycard.names.pickled_modules import walk_modules
from anycard.names.stored import Metadata, StateDict
from anycard.names.wrappers import OWN_NAMES, SEGMENTS, outer_prefix, without_segments

T = TypeVar("T")


def pick(candidates: Sequence[StateDict], key: str | None, path: str) -> StateDict:
    """The state dict that `key` names; without a key, the only one.

    Raises:
        ChoiceError: None fits the key, or several are there and no key was given.
        FormatError: Two of its tensors have one name.
    """
    found = _pick(candidates, key, path)
    if found.clash:
        reason = f"two tensors have one name, {found.clash!r}: names with dots beside dicts in dicts"
        raise FormatError(reason, path=path, name=found.clash)
    return found


def _pick(candidates: Sequence[StateDict], key: str | None, path: str) -> StateDict:
    if not candidates:
        raise ChoiceError(f"{path} holds no tensors", path=path)
    if key is None:
        if len(candidates) == 1:
            return candidates[0]
        raise ChoiceError(
            f"{path} holds {len(candidates)} state dicts: {_listed(c.key for c in candidates)}. "
            f"Pick one with key=, for example key={candidates[0].key!r}",
            path=path,
        )
    return by_key(candidates, key, path)


def by_key(candidates: Sequence[StateDict], key: str, path: str) -> StateDict:
    """The candidate of this key: the full path, its last parts, or a prefix within a state dict."""
    exact = [c for c in candidates if c.key == key]
    tails = [c for c in candidates if c.key.endswith("." + key)]
    for fits in (exact, tails):
        if len(fits) == 1:
            return fits[0]
    below = [c for c in candidates if c.key.startswith(key + ".")]
    if len(below) == 1:
        return below[0]
    inner = [part for c in candidates if (part := subtree(c, key)) is not None]
    if len(inner) == 1:
        return inner[0]
    raise ChoiceError(f"{path} holds no state dict {key!r}; it holds {_listed(c.key for c in candidates)}", path=path)


def subtree(candidate: StateDict, key: str) -> StateDict | None:
    """The part of a state dict below a prefix (a Lightning module's attribute), by stored or by canonical names."""
    outer = outer_prefix([without_segments(name) for name in candidate.tensors])
    for named in (str, partial(_canonical, outer)):
        for prefix in (key, key.removeprefix(candidate.key + ".")):
            tensors = _below(candidate.tensors, prefix, named)
            if tensors:
                full = f"{candidate.key}.{prefix}" if candidate.key else prefix
                inner = None if candidate.canonical is None else {n: without_segments(n) for n in tensors}
                told = partial(_told, candidate, prefix, named)
                extras = _below(candidate.extras, prefix, named)
                held = None if inner is None else _module_at(candidate.held, prefix)
                return StateDict(full, tensors, inner, extras, candidate.wrappers, told=told, held=held)
    return None


def _module_at(model: object, path: str) -> object:
    """A whole model's part, by its path as stored or as canonical."""
    paths = ((".".join(parts), held.obj) for held in walk_modules(model) for parts in (held.stored, held.canonical))
    return next((part for name, part in paths if name == path), None)


def _canonical(outer: str, name: str) -> str:
    return without_segments(name).removeprefix(outer)


def _below(held: Mapping[str, T], prefix: str, named: Callable[[str], str]) -> dict[str, T]:
    """What lies below a prefix, by the rest of its name."""
    names = ((named(name), value) for name, value in held.items())
    return {name[len(prefix) + 1 :]: value for name, value in names if name.startswith(prefix + ".")}


def _told(candidate: StateDict, prefix: str, named: Callable[[str], str]) -> Metadata:
    told = _below(candidate.metadata, prefix, named)
    for path, held in candidate.metadata.items():
        if named(path) == prefix:
            told[""] = held
    return told


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) if key else "'' (the top level)" for key in keys)


def canonical_names(found: StateDict, *, marked: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """Stored name -> canonical name where no model is given, and the wrappers that went.

    A wrapper's own buffers are left out. `marked` says that anycard wrote the file: its names are
    canonical already.

    Raises:
        FormatError: Two stored names are one tensor's canonical name.
    """
    if marked:
        return {name: name for name in found.tensors}, ()
    if found.canonical is not None:
        names = {stored: name for stored, name in found.canonical.items() if stored not in found.own}
        return _checked(names), found.wrappers
    bare = {name: without_segments(name) for name in found.tensors}
    prefix = outer_prefix(bare.values())
    names = {}
    for stored, name in bare.items():
        if _is_own(name, prefix):
            continue
        names[stored] = name.removeprefix(prefix)
    wrappers = ["module"] * prefix.count("module.")
    wrappers += sorted({part for n in found.tensors for part in n.split(".") if part in SEGMENTS})
    return _checked(names), tuple(wrappers)


def wrapper_state(found: StateDict) -> dict[str, str]:
    """Canonical name -> stored name of what belongs to wrappers (`n_averaged`), where no model is given."""
    if found.canonical is not None:
        return {found.canonical[stored]: stored for stored in found.own}
    bare = {name: without_segments(name) for name in found.tensors}
    prefix = outer_prefix(bare.values())
    return {name.rpartition(".")[2]: stored for stored, name in bare.items() if _is_own(name, prefix)}


def _is_own(name: str, prefix: str) -> bool:
    outer, _, last = name.rpartition(".")
    return bool(prefix) and last in OWN_NAMES and prefix.startswith(outer) and outer + "." != prefix


def _checked(names: dict[str, str]) -> dict[str, str]:
    taken: dict[str, str] = {}
    for stored, name in names.items():
        if name in taken:
            raise FormatError(f"{stored!r} and {taken[name]!r} would both be called {name!r}", name=stored)
        taken[name] = stored
    return names
