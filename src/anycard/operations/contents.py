"""Copy a file's object into what the pickler writes: plain data and tensors, canonical names, no classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from anycard.checkpoint import Checkpoint
from anycard.disk.pieces import Piece
from anycard.names.choosing import canonical_names
from anycard.names.paths import join
from anycard.names.stored import StateDict
from anycard.operations.proving import Proof
from anycard.pickles.stubs import Inert, Size
from anycard.pickles.writer import GlobalRef, Reduced, TensorRef
from anycard.plans.matching import Match, canonical_metadata
from anycard.tensors import TensorInfo, row_major

_GONE = object()
_PLAIN = (bool, int, float, str, bytes, complex, type(None))


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
        metadata = self._metadata(found, names)
        if metadata is not None:
            tree._metadata = metadata  # type: ignore[attr-defined]
        return tree

    def _metadata(self, found: StateDict, names: Mapping[str, str]) -> OrderedDict[str, dict[str, Any]] | None:
        mark = self._ckpt.mark
        held = canonical_metadata(Match(found, "", {name: stored for stored, name in names.items()}, ()), mark)
        if "metadata" in mark:  # it leaves out what is version 1
            held = {**{path: {"version": 1} for name in names.values() for path in _above(name)}, **held}
        return OrderedDict(held) if held else None

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
        if found is not None and (found.canonical is not None or _flat(value, found)):
            return self.state_dict(found)
        if isinstance(value, TensorInfo):
            return self._tensor(value, path)
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Mapping):
            items = ((k, self._copy(v, join(path, k), dicts)) for k, v in value.items())
            return {k: v for k, v in items if v is not _GONE and not isinstance(k, (Inert, type))}
        if isinstance(value, Size):
            return Reduced(GlobalRef("torch", "Size"), (tuple(value),))
        if isinstance(value, (list, tuple, set)):
            copies = (self._copy(v, join(path, i), dicts) for i, v in enumerate(value))
            return type(value)(None if v is _GONE else v for v in copies)
        self.gone.append(path)
        return _GONE


def _flat(value: Any, found: StateDict) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(name), TensorInfo) for name in found.tensors)


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
