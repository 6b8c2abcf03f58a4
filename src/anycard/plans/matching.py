"""Match the stored names of a file against the names of a model. No torch, no bytes.

Every stored name votes, with each of its suffixes that the model has, for the place in the file where
the model's state dict begins; `module` segments count or not, wherever a wrapper may have put them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from anycard.arguments import shown
from anycard.errors import ChoiceError, MismatchError
from anycard.names.paths import moved
from anycard.names.stored import StateDict
from anycard.names.wrappers import OWN_NAMES, has_no_segments, removable, without_segments
from anycard.tensors import TensorInfo

Rename = Mapping[str, str] | Sequence[tuple[str | re.Pattern[str], str]] | Callable[[str], str]
Only = str | Sequence[str] | Callable[[str], bool]


@dataclass
class Match:
    """One way to read a candidate as the model's state dict.

    Attributes:
        source: The candidate state dict.
        prefix: Where in it the model's names begin, canonical, "" for its top.
        names: Canonical name in the model's terms -> stored name (relative to the candidate), for
            every stored tensor below the prefix, whether or not the model has the name.
        outside: Stored names of the candidate that lie beside the prefix.
        wrapper_state: Canonical name -> stored name of what belongs to a wrapper (`n_averaged`).
        collision: Two stored names that would be one, or "".
        hits: How many of the model's names are there.
        exact: How many of these have the model's shape; counted where there is a choice.
    """

    source: StateDict
    prefix: str
    names: dict[str, str]
    outside: tuple[str, ...]
    wrapper_state: dict[str, str] = field(default_factory=dict)
    collision: str = ""
    hits: int = 0
    exact: int = 0

    @property
    def beside(self) -> int:
        """How many stored tensors the model has no name for."""
        return len(self.names) - self.hits + len(self.outside)

    @property
    def where(self) -> str:
        """The full path in the file."""
        return ".".join(part for part in (self.source.key, self.prefix) if part)


def find(
    candidates: Sequence[StateDict],
    unions: Sequence[StateDict],
    shapes: Mapping[str, tuple[int, ...]],
    rename: Rename | None,
    path: str,
) -> Match:
    """The one state dict (or part of one) that fits a model best.

    Args:
        candidates: What the file holds, by structure.
        unions: Levels of the file taken as one state dict; asked only where they have more of the model's names.
        shapes: The model's canonical names and shapes.
        rename: The caller's renames, on canonical names.

    Raises:
        ChoiceError: Two fit equally well, or there is none.
        MismatchError: Two names become one by `rename`.
    """
    if rename is not None:
        check_rename(rename)
    matches = _scored(candidates, shapes, rename)
    if not matches and not shapes:
        return Match(StateDict("", {}), "", {}, ())
    if not matches:
        raise ChoiceError(f"{path} holds no tensors that could be a model's weights", path=path)
    if unions and max(m.hits for m in matches) < len(shapes):
        wider = _scored(unions, shapes, rename)
        if max(m.hits for m in wider) > max(m.hits for m in matches):
            matches = wider
    chosen = _best(matches, shapes, path)
    if chosen.collision:
        raise MismatchError(chosen.collision, path=path)
    return chosen


def last_resorts(candidates: Sequence[StateDict], shapes: Mapping[str, tuple[int, ...]]) -> list[Match]:
    """Readings from below the path that all names share: for names that only the model's own hooks understand."""
    lookup = _lookup(shapes)
    found = []
    for candidate in candidates[:10]:
        variants = _variants(candidate)
        shared = _shared_path([forms[0] for forms, _ in variants.values()])
        for depth in range(1, min(len(shared), 6) + 1):
            found.append(_read_from(candidate, ".".join(shared[:depth]), variants, lookup, None))
        found.append(_read_from(candidate, "", variants, lookup, None))
    return found


def _shared_path(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    if not names:
        return ()
    low, high = min(names), max(names)
    same = 0
    while same < min(len(low), len(high)) - 1 and low[same] == high[same]:
        same += 1
    return low[:same]


def _scored(
    candidates: Sequence[StateDict], shapes: Mapping[str, tuple[int, ...]], rename: Rename | None
) -> list[Match]:
    matches = [m for c in candidates for m in _readings(c, shapes, rename)]
    for match in matches:
        match.hits = match.hits or len(shapes.keys() & match.names.keys())
    for match in matches if len(matches) > 1 else ():
        tensors = match.source.tensors
        match.exact = sum(n in match.names and tensors[match.names[n]].shape == shape for n, shape in shapes.items())
    return matches


def _best(matches: Sequence[Match], shapes: Mapping[str, tuple[int, ...]], path: str) -> Match:
    best = max((m.exact, m.hits) for m in matches)
    if best == (0, 0):
        return max(matches, key=lambda m: (not m.prefix, len(m.names)))  # the plan says that nothing fits
    top = [m for m in matches if (m.exact, m.hits) == best]
    whole = [m for m in top if not m.prefix] or top
    chosen = _distinct(whole, shapes) if len(whole) > 1 else whole
    if len(chosen) > 1:
        least = min(m.beside for m in chosen)
        chosen = [m for m in chosen if m.beside == least]
    if not best[0]:
        return chosen[0]  # names alone: the plan shows the shapes
    if len(chosen) > 1:
        raise ChoiceError(
            f"{path} holds {len(chosen)} state dicts that fit equally well: "
            f"{', '.join(repr(m.where) for m in chosen)}. Pick one with key={chosen[0].where!r}",
            path=path,
        )
    return chosen[0]


def _distinct(matches: list[Match], shapes: Mapping[str, object]) -> list[Match]:
    """One match for each set of stored tensors."""
    found: dict[object, Match] = {}
    for match in matches:
        held = infos(match)
        used = tuple(held[name].place if name in held else None for name in shapes)
        found.setdefault(used, match)
    return list(found.values())


def _readings(candidate: StateDict, shapes: Mapping[str, tuple[int, ...]], rename: Rename | None) -> list[Match]:
    """The candidate from its top, and from every prefix that its names vote for."""
    if rename is None and candidate.canonical is None and has_no_segments(candidate.tensors):
        names = dict(zip(candidate.tensors, candidate.tensors, strict=True))
        if shapes and shapes.keys() <= names.keys():  # what the reading from the top would find, name by name
            return [Match(candidate, "", names, (), hits=len(shapes))]
    variants = _variants(candidate)
    lookup = _lookup(shapes)
    top = _read_from(candidate, "", variants, lookup, rename)
    if shapes and all(name in top.names for name in shapes):
        return [top]  # no place further down could have more, and the top goes before
    prefixes: dict[str, int] = {}
    for forms, _ in variants.values():
        for prefix in {p for form in forms for p in _voted(form, lookup)}:
            prefixes[prefix] = prefixes.get(prefix, 0) + 1
    ranked = sorted(prefixes, key=lambda p: (-prefixes[p], len(p)))[:50]
    return [top, *(_read_from(candidate, prefix, variants, lookup, rename) for prefix in ranked)]


class _Stored(NamedTuple):
    """A stored name's possible names in parts, the one without any wrapper segment first.

    `own`: where the model does not have it, it is a wrapper's own buffer (`n_averaged`).
    """

    forms: list[tuple[str, ...]]
    own: bool


def _variants(candidate: StateDict) -> dict[str, _Stored]:
    if candidate.canonical is not None:
        names = candidate.canonical.items()
        return {stored: _Stored([tuple(name.split("."))], stored in candidate.own) for stored, name in names}
    parts = {stored: tuple(without_segments(stored).split(".")) for stored in candidate.tensors}
    nodes = removable(parts.values())
    return {
        stored: _Stored(_forms(name, nodes), name[-1] in OWN_NAMES and name[:-1] in nodes)
        for stored, name in parts.items()
    }


def _forms(name: tuple[str, ...], nodes: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The name without every `module` that may be a wrapper's, then with some of them, then as it is."""
    if "module" not in name:
        return [name]
    places = [i for i, part in enumerate(name) if part == "module" and name[:i] in nodes]
    some = places[:6]
    forms = {tuple(part for i, part in enumerate(name) if i not in places): None}
    for mask in range((1 << len(some)) - 1, -1, -1):
        gone = {place for bit, place in enumerate(some) if mask >> bit & 1}
        forms[tuple(part for i, part in enumerate(name) if i not in gone)] = None
    return list(forms)


def _lookup(shapes: Iterable[str]) -> dict[tuple[str, ...], str]:
    """The model's names in parts, also without its own removable `module` segments."""
    parts = {tuple(name.split(".")): name for name in shapes}
    nodes = removable(parts)
    reduced = {_forms(name, nodes)[0]: full for name, full in parts.items()} if nodes else {}
    return {**reduced, **parts}


def _voted(form: tuple[str, ...], lookup: Mapping[tuple[str, ...], str]) -> Iterable[str]:
    for start in range(1, len(form)):
        if form[start:] in lookup:
            yield ".".join(form[:start])


def _read_from(
    candidate: StateDict,
    prefix: str,
    variants: Mapping[str, _Stored],
    lookup: Mapping[tuple[str, ...], str],
    rename: Rename | None,
) -> Match:
    start = tuple(prefix.split(".")) if prefix else ()
    match = Match(candidate, prefix, {}, ())
    outside = []
    for stored, (forms, own) in variants.items():
        below = [form[len(start) :] for form in forms if form[: len(start)] == start and len(form) > len(start)]
        if not below:
            outside.append(stored)
            continue
        name = _name_for(below, lookup, rename)
        if own and not any(form in lookup for form in below):
            match.wrapper_state[".".join(below[0])] = stored
        elif name in match.names:
            match.collision = f"{match.names[name]!r} and {stored!r} would both become {name!r}: two names are one"
        else:
            match.names[name] = stored
    match.outside = tuple(outside)
    return match


def _name_for(forms: Sequence[tuple[str, ...]], lookup: Mapping[tuple[str, ...], str], rename: Rename | None) -> str:
    """The model's name for a stored tensor, whichever of its forms the model has; else its canonical name."""
    if rename is not None:
        forms = [tuple(renamed(".".join(forms[0]), rename).split("."))]
    return next((lookup[form] for form in forms if form in lookup), ".".join(forms[0]))


def check_rename(rename: Rename) -> None:
    """Refuse what is no rename before anything is matched.

    Raises:
        ValueError: A pattern is no regular expression, or the list holds no pairs.
        TypeError: It is no mapping, list or function.
    """
    if isinstance(rename, Mapping):
        odd = [pair for pair in rename.items() if not all(isinstance(part, str) for part in pair)]
        if odd:
            raise TypeError(f"rename: {odd[0]!r:.80} are no two names")
        return
    if callable(rename):
        return
    if not isinstance(rename, (list, tuple)):
        raise TypeError(f"rename is a mapping, a list of (regex, replacement) or a function, not {rename!r:.80}")
    for pair in rename:
        try:
            pattern, replacement = pair
            re.sub(pattern, replacement, "")
        except (re.error, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"rename: {pair!r:.80} is no (regex, replacement): {error}") from None


def renamed(name: str, rename: Rename) -> str:
    """The name after the caller's renames: mapping, list of (regex, replacement), or function."""
    if callable(rename):
        new = rename(name)
        if not isinstance(new, str):
            raise TypeError(f"rename gave {new!r:.80} for {name!r}: it gives every name, also one that stays as it is")
        return new
    if isinstance(rename, Mapping):
        for old in sorted(rename, key=len, reverse=True):
            if name == old:
                return rename[old]
            bare = old.rstrip(".")
            if name.startswith(bare + "."):
                new = rename[old].rstrip(".")
                rest = name[len(bare) + 1 :]
                return f"{new}.{rest}" if new else rest
        return name
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


def refuse_odd_rules(rename: object, only: object) -> None:
    """TypeError where `rename=` or `only=` is nothing that they know."""
    globs = isinstance(only, str) or (isinstance(only, Collection) and all(isinstance(glob, str) for glob in only))
    if only is not None and not callable(only) and not globs:
        raise TypeError(f"only is a glob, a list of globs or a function of a name, not {shown(only)}")
    pairs = isinstance(rename, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in rename)
    if rename is not None and not callable(rename) and not isinstance(rename, Mapping) and not pairs:
        raise TypeError(
            f"rename is a mapping, a list of (regex, replacement) or a function of a name, not {shown(rename)}"
        )


def selected(names: Iterable[str], only: Only) -> set[str]:
    """The names that `only=` asks for.

    Raises:
        ValueError: It asks for none of them.
    """
    held = list(names)
    chosen = {name for name in held if asked_for(name, only)}
    if not chosen:
        raise ValueError(f"only={only!r} matches none of the model's {len(held)} names, such as {held[:3]}")
    return chosen


def asked_for(name: str, only: Only) -> bool:
    """Whether `only=` asks for the name."""
    if callable(only):
        return bool(only(name))
    globs = [only] if isinstance(only, str) else only
    return any(fnmatch.fnmatchcase(name, g) or name.startswith(g.rstrip(".") + ".") for g in globs)


def infos(match: Match) -> dict[str, TensorInfo]:
    """Canonical name -> stored tensor, of a match."""
    return {name: match.source.tensors[stored] for name, stored in match.names.items()}


def extra_states(match: Match, wanted: Iterable[str]) -> dict[str, str]:
    """The model's name of an extra state -> the stored one: that of its own module, else the only one that ends so."""
    if not match.source.extras:
        return {}
    paths = _module_paths(match)
    own = {moved(without_segments(stored), paths): stored for stored in match.source.extras}
    found = {name: own[name] for name in wanted if name in own}
    for name in wanted:
        ends = [n for n in match.source.extras if n.endswith("." + name) and n not in found.values()]
        if name not in found and len(ends) == 1:
            found[name] = ends[0]
    return found


def canonical_metadata(match: Match, mark: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module path in the model -> what the file says of that module (`{"version": 2}`).

    A torch zip keeps it in `_metadata`; a safetensors file of ours keeps what is not `{"version": 1}` in its mark.
    """
    found = {}
    if match.source.metadata:
        paths = _module_paths(match)
        found = {moved(without_segments(p), paths): held for p, held in match.source.metadata.items()}
    marked = mark.get("metadata")
    if isinstance(marked, dict):
        found.update({path: kept for path, kept in marked.items() if isinstance(kept, dict)})
    return found


def versions_of_classes(source: StateDict, mark: Mapping[str, Any]) -> bool:
    """A state dict out of a whole model that says nothing of versions: they are in the code of its classes.

    `convert` notes the keys of such in the mark.
    """
    keys = mark.get("classes")
    noted = isinstance(keys, list) and any(source.key == k or not k or source.key.startswith(f"{k}.") for k in keys)
    return noted or (source.canonical is not None and "metadata" not in mark)


def _module_paths(match: Match) -> dict[str, str]:
    """Module path in the file, without segments that are nobody's own -> in the model, as tensors' names show them."""
    found: dict[str, str] = {}
    for name, stored in match.names.items():
        outer, inner = without_segments(stored), name
        while True:
            outer, _, last = outer.rpartition(".")
            inner, _, mine = inner.rpartition(".")
            if last != mine or found.setdefault(outer, inner) != inner or not inner:
                break
    return found
