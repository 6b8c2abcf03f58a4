"""Walk a file's object: every tensor and every other part by its full path. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from anycard.errors import FormatError
from anycard.limits import DEFAULT, Limits
from anycard.names.mappings import Apart, entries, items, mapping_of, named
from anycard.names.paths import join
from anycard.names.pickled_modules import COMMON, is_module, module_state, wrapped_module
from anycard.pickles.brief import key_text
from anycard.pickles.composite import Composite
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_LONG = 256  # characters of a path
_CHARACTERS = 16 << 20  # of all paths, beyond that
_DEEPEST = 16  # levels of what a module keeps
_GROUPS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOLDING = (Mapping, list, tuple, Inert)
_AGAIN = "<…>"  # for what was listed before, where that would be much


@dataclass
class Contents:
    """What a walk over a file's object finds.

    Attributes:
        tensors: Full path -> tensor.
        objects: Full path -> anything else: leaves of plain data, numpy arrays, inert stubs.
        above: Full path of a stub -> `id` of everything that holds it, so that links back are told.
        clashes: Paths that several tensors would have (names with dots beside dicts in dicts), and how many: all
            but the first have a number added.
        numbers: The same of objects.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    above: dict[str, tuple[int, ...]] = field(default_factory=dict)
    clashes: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def contents(tree: object, limits: Limits = DEFAULT) -> Contents:
    """Every tensor and every other part of a file's object, by full path.

    Raises:
        FormatError: More parts, deeper nesting or more sharing than `limits` allow.
    """
    found = Contents()
    stack: list[tuple[str, object, tuple[int, ...], bool]] = [("", tree, (), False)]
    count = _Count(limits)
    modules: list[tuple[str, Inert]] = []
    while stack:
        path, obj, above, repeated = stack.pop()
        count.one(repeated)
        if isinstance(obj, TensorInfo):
            count.holding(above)
            _keep(found, path, obj)
            continue
        if count.is_listed_once(obj):
            if id(obj) not in above:
                _keep_object(found, path, _AGAIN)
            continue
        children = parts_of(obj)
        if isinstance(obj, Inert) and not repeated and not obj.module.startswith("torch.nn."):
            modules.append((path, obj))
        if not children:
            if not (isinstance(obj, Inert) and module_state(obj) is not None):
                _keep_object(found, path, obj)
            continue
        if id(obj) in above:
            continue
        if len(above) > limits.depth:
            raise FormatError(f"the file's object is nested deeper than {limits.depth} levels at {path[:200]}")
        repeated = count.again(obj, len(children)) or repeated
        inside = (*above, id(obj))
        if isinstance(obj, Inert) and not is_module(obj):
            found.above[_keep_object(found, path, obj)] = above
        elif isinstance(obj, Inert) and not repeated:
            for name, value in _settings(obj):
                found.above[_keep_object(found, count.path(join(path, name)), value)] = inside
        arrays = holds_weights(mapping_of(obj))
        if {type(child) for _, child in children} == {TensorInfo} and (arrays or not isinstance(obj, Mapping)):
            count.one(repeated, len(children))
            count.holding(inside)
            count.below(path, children)
            held: dict[str, TensorInfo] = {join(path, n) if path else n: child for n, child in children}  # type: ignore[misc]
            if len(held) == len(children) and found.tensors.keys().isdisjoint(held):
                found.tensors.update(held)
                continue
            for name, child in children:
                _keep(found, join(path, name), child)  # type: ignore[arg-type]
            continue
        for name, child in reversed(children):
            if path in found.above and count.is_listed_once(child):
                count.one(False)  # what holds it is listed with all that is in it
                continue
            below = count.path(join(path, name))
            if isinstance(child, TensorInfo) and child.is_array and not arrays:
                _keep_object(found, below, child)
            else:
                stack.append((below, child, inside, repeated))
    _find_kept(found, modules, count)
    return found


def _find_kept(found: Contents, modules: list[tuple[str, Inert]], count: _Count) -> None:
    """Tensors not listed yet that modules keep in lists, objects and dicts of their own.

    Each is looked into once: what a model keeps may lead back to it in many ways.
    """
    stack: list[tuple[str, object, int]] = []
    for path, module in reversed(modules):
        state = [(n, v) for n, v in items(module_state(module)) if n not in _GROUPS and "hook" not in n]
        stack += [(join(path, n), v, 0) for n, v in reversed(state) if isinstance(v, _HOLDING)]
    places = {info.place for info in found.tensors.values()} if stack else set()
    while stack:
        path, obj, depth = stack.pop()
        if isinstance(obj, TensorInfo):
            if not obj.is_array and obj.place not in places:
                _keep(found, path, obj)
        elif depth < _DEEPEST and count.is_new(obj):
            parts = [(n, v) for n, v in parts_of(obj) if isinstance(v, (TensorInfo, *_HOLDING))]
            stack += [(count.path(join(path, n)), v, depth + 1) for n, v in reversed(parts)]


def _settings(module: Inert) -> Iterator[tuple[str, object]]:
    """What a module of someone's own keeps beside tensors, dicts (listed part by part) and modules."""
    if module.module.startswith("torch.nn."):
        return
    for name, value in items(module_state(module)):
        if name.startswith("_") or name in COMMON or isinstance(value, (TensorInfo, Mapping)) or is_module(value):
            continue
        yield name, value


def _keep(found: Contents, path: str, info: TensorInfo) -> None:
    if found.tensors.setdefault(path, info) is not info and found.tensors[path].place != info.place:
        count = found.clashes.get(path, 1) + 1
        while f"{path}#{count}" in found.tensors:
            count += 1
        found.clashes[path] = count
        found.tensors[f"{path}#{count}"] = info


def _keep_object(found: Contents, path: str, obj: object) -> str:
    """Gives the path that it is kept by: with a number added, where another object has its own."""
    if found.objects.setdefault(path, obj) is obj:
        return path
    count = found.numbers.get(path, 1) + 1
    while f"{path}#{count}" in found.objects:
        count += 1
    found.numbers[path] = count
    found.objects[f"{path}#{count}"] = obj
    return f"{path}#{count}"


class _Count:
    """Bounds on a walk: parts in all, parts that were met before, and the text of paths.

    A long key costs its bytes once in the file, and in the path of all that lies below it.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._nodes = 0
        self._repeats = 0
        self._characters = 0
        self._seen: dict[int, int] = {}
        self._holding: set[int] = set()

    def one(self, repeated: bool, parts: int = 1) -> None:
        self._nodes += parts
        self._repeats += repeated * parts
        if self._nodes > self._limits.nodes or self._repeats > self._limits.repeats:
            raise FormatError("the file's object has more parts than anything real (a bomb?)")

    def holding(self, above: tuple[int, ...]) -> None:
        """These hold a tensor."""
        for held in reversed(above):
            if held in self._holding:
                return
            self._holding.add(held)

    def is_listed_once(self, obj: object) -> bool:
        """It holds no tensors, was listed before, and not much more may be listed again."""
        parts = self._seen.get(id(obj))
        known = parts is not None and id(obj) not in self._holding
        return known and self._repeats + (parts or 0) > self._limits.repeats // 4

    def is_new(self, obj: object) -> bool:
        """It was not met before."""
        return not self.again(obj, 0)

    def path(self, path: str) -> str:
        """The same path, counted when it is made: a dict's entries are many."""
        self._characters += len(path) - _LONG
        self._refuse_long(path)
        return path

    def below(self, path: str, children: Sequence[tuple[str, object]]) -> None:
        """The same for many at once, before they are made; at the top each is the file's own key."""
        if path:
            self._characters += sum(len(name) for name, _ in children) - _LONG * len(children)
            self._characters += len(path) * len(children)
            self._refuse_long(path)

    def _refuse_long(self, path: str) -> None:
        if self._characters > _CHARACTERS:
            raise FormatError(f"the paths of the file's object are longer than anything real: {path[:200]}…")

    def again(self, obj: object, parts: int) -> bool:
        """It was met before: what lies below counts as repeated."""
        known = id(obj) in self._seen
        self._seen[id(obj)] = parts
        return known


def holds_weights(obj: object) -> bool:
    """numpy arrays in it are weights, as in a state dict of arrays: it is a dict of nothing but arrays and tensors."""
    if not isinstance(obj, Mapping):
        return False
    if set(map(type, obj.values())) <= {TensorInfo}:
        return True
    return all(type(value) is TensorInfo or key_text(name).endswith("_extra_state") for name, value in obj.items())


def parts_of(obj: object) -> list[tuple[str, object]]:
    """What an object holds, by name: of a module its tensors and modules, of a list its items by number."""
    if isinstance(obj, Mapping):
        return entries(obj)
    if isinstance(obj, (list, tuple)):
        return _numbered(obj)
    return _apart(_inert_children(obj)) if isinstance(obj, Inert) else []


def _numbered(held: Iterable[object]) -> list[tuple[str, object]]:
    return [(str(index), value) for index, value in enumerate(held)]


def _apart(children: Iterable[tuple[str, object]]) -> list[tuple[str, object]]:
    """What an object holds twice by one name (an attribute that is a key as well) once, all else by its own."""
    children = list(children)
    if len({name for name, _ in children}) == len(children):
        return children
    held: dict[str, object] = {}
    apart = Apart()
    for name, value in children:
        if name not in held or held[name] is not value:
            held[apart.name(name)] = value
    return list(held.items())


def _inert_children(obj: Inert) -> Iterator[tuple[str, object]]:
    if isinstance(obj, Composite) and obj.parts is not None:
        yield from obj.parts.items()
        return
    state = module_state(obj)
    if state is not None:
        for group in _GROUPS[:3]:
            yield from ((name, value) for name, value in items(state.get(group)) if value is not None)
        yield from ((n, v) for n, v in items(state) if isinstance(v, (TensorInfo, Composite)))
        yield from ((n, v) for n, v in items(state) if not n.startswith("_") and isinstance(v, Mapping))
        return
    inner = wrapped_module(obj)
    if inner is not None:
        yield "_orig_mod", inner
        return
    inside: object = obj.state if obj.attributes is None else obj.attributes
    if isinstance(inside, (list, tuple)):
        yield from _numbered(inside)
    yield from items(inside)
    yield from _numbered((*obj.args, *obj.items))
    yield from named(obj.pairs)
