"""Copy a file's object into what the pickler writes: plain data and tensors, canonical names, no classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from anycard.checkpoint import Checkpoint
from anycard.disk.pieces import Piece
from anycard.names.choosing import canonical_names
from anycard.names.paths import join
from anycard.names.stored import StateDict
from anycard.operations.proving import Proof
from anycard.pickles.stubs import Counted, Inert, Size
from anycard.pickles.writer import COUNTER, GlobalRef, Reduced, TensorRef
from anycard.plans.matching import Match, canonical_metadata
from anycard.tensors import DTYPES, TensorInfo, row_major

_GONE = object()
_DEEPEST = 200  # levels of containers
_PLAIN = (bool, int, float, str, bytes, bytearray, complex, type(None))


class Copier:
    """Gathers the storages of what is copied; each tied tensor once.

    Attributes:
        pieces: The storages, in the order of their keys.
        count: Tensors copied.
        gone: Full paths of what is no plain data, and stays behind.
    """

    def __init__(self, ckpt: Checkpoint, proof: Proof) -> None:
        self._piece = proof.piece
        self.pieces: list[Piece] = []
        self.count = 0
        self.gone: list[str] = []
        self._ckpt = ckpt
        self._known: dict[object, TensorRef] = {}
        self._above: set[int] = set()  # what holds the value in hand; a container may hold itself

    def everything(self) -> Any:
        """All of the file's object; each state dict in it under canonical names."""
        dicts = {found.key: found for found in self._ckpt.state_dicts}
        copied = self._copy(self._ckpt.tree, "", dicts)
        return {} if copied is _GONE else copied

    def state_dict(self, found: StateDict) -> OrderedDict[str, Any]:
        """One state dict under canonical names, with its modules' versions."""
        names, _ = canonical_names(found, marked=self._ckpt.marked)
        tree: OrderedDict[str, Any] = OrderedDict()
        for stored, name in names.items():
            tree[name] = self._tensor(found.tensors[stored], name)
        for name, value in found.extras.items():
            copied = self._copy(value, name, {})
            if copied is not _GONE:
                tree[name] = copied
        if metadata := versions(self._ckpt, found):
            tree._metadata = metadata  # type: ignore[attr-defined]
        return tree

    def _tensor(self, info: TensorInfo, name: str) -> TensorRef:
        self.count += 1
        if info.place not in self._known or not info.nbytes:
            key = str(len(self.pieces))
            self.pieces.append(self._piece(info, name))
            shape = info.shape
            self._known[info.place] = TensorRef(key, info.dtype, "cpu", info.numel, 0, shape, row_major(shape))
        return self._known[info.place]

    def _copy(self, value: Any, path: str, dicts: Mapping[str, StateDict]) -> Any:
        found = dicts.get(path)
        if found is not None and is_flat(value, found):
            return self._with_the_rest(self.state_dict(found), value, found, path)
        if found is not None and found.canonical is not None:
            self.gone += self._beside(found)
            return self.state_dict(found)
        if isinstance(value, TensorInfo):
            return self._tensor(value, path)
        if type(value) in _PLAIN or _is_dtype(value):
            return _key(value)
        if isinstance(value, Size):
            return Reduced(GlobalRef("torch", "Size"), (tuple(value),))
        if (
            isinstance(value, (Mapping, list, tuple, set, frozenset))
            and id(value) not in self._above
            and len(self._above) < _DEEPEST
        ):
            self._above.add(id(value))
            made = self._container(value, path, dicts)
            self._above.discard(id(value))
            return made
        self.gone.append(path)
        return _GONE

    def _beside(self, found: StateDict) -> list[str]:
        """What a whole model holds that is not in its state dict, tensors too."""
        above = join(found.key, "") if found.key else ""
        inside = {above + name for name in found.tensors}
        held = [name for name in self._ckpt.tensors if name not in inside] + list(self._ckpt.objects)
        return [name for name in held if name.startswith(above)]

    def _with_the_rest(
        self, tree: OrderedDict[str, Any], value: Mapping[Any, Any], found: StateDict, path: str
    ) -> OrderedDict[str, Any]:
        """The state dict, and what lies among its tensors and is none."""
        rest = {k: v for k, v in value.items() if not (k in found.tensors or k in found.extras)}
        self._above.add(id(value))
        for key, held in self._container(rest, path, {}).items():
            tree.setdefault(key, held)
        self._above.discard(id(value))
        return tree

    def _set(self, copies: Iterable[Any], path: str) -> Any:
        """A set, for a frozenset too: plain PyTorch's reader of weights knows no other, and no set within a set."""
        try:
            return {copy for copy in copies if copy is not _GONE}
        except TypeError:
            self.gone.append(path)
            return _GONE

    def _container(self, value: Any, path: str, dicts: Mapping[str, StateDict]) -> Any:
        if not isinstance(value, Mapping):
            copies = [self._copy(v, join(path, i), dicts) for i, v in enumerate(value)]
            return self._set(copies, path) if isinstance(value, (set, frozenset)) else type(value)(_or_none(copies))
        made: dict[Any, Any] = {}
        for key, held in value.items():
            own, below = _key(key), join(path, key)
            if own is _GONE:  # an enumeration's member, say: its class is needed for it
                self.gone.append(below)
            elif (copied := self._copy(held, below, dicts)) is not _GONE:
                made[own] = copied
        return Reduced(COUNTER, (made,)) if isinstance(value, Counted) else made


def _or_none(copies: Iterable[Any]) -> Iterator[Any]:
    return (None if copy is _GONE else copy for copy in copies)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Inert) and value.module == "torch" and value.name in DTYPES


def _key(key: Any) -> Any:
    """What cannot change as the pickler writes it; `_GONE` for an object."""
    if type(key) is tuple:
        parts = tuple(_key(part) for part in key)
        return _GONE if _GONE in parts else parts
    if _is_dtype(key):
        return GlobalRef("torch", key.name)
    return key if type(key) in _PLAIN else _GONE


def is_flat(value: Any, found: StateDict) -> TypeGuard[Mapping[Any, Any]]:
    """The object is a dict that has the state dict's tensors under these very names."""
    return isinstance(value, Mapping) and all(isinstance(value.get(name), TensorInfo) for name in found.tensors)


def versions(ckpt: Checkpoint, found: StateDict) -> OrderedDict[str, dict[str, Any]]:
    """`_metadata` of a state dict under canonical names; empty where the file tells nothing of it."""
    names, _ = canonical_names(found, marked=ckpt.marked)
    held = canonical_metadata(Match(found, "", {name: stored for stored, name in names.items()}, ()), ckpt.mark)
    if "metadata" in ckpt.mark:  # it leaves out what is version 1
        held = {**{path: {"version": 1} for path in _modules(ckpt.mark, names.values())}, **held}
    return OrderedDict(held)


def _modules(mark: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """Paths of modules: as a whole model of ours lists them, else those above the names."""
    listed = mark.get("modules")
    if isinstance(listed, list):
        return (path for path in listed if isinstance(path, str))
    return (path for name in names for path in _above(name))


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
