"""TorchScript archives (`torch.jit.save`): modules and their tensors from `data.pkl`. The code is only read.

Which attributes are parameters and which are buffers, only the code says: `__parameters__ = ["weight", ]` at
the top of each class. Source: torch/csrc/jit/serialization/{export_module,import}.cpp.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.formats.torch_zip import Archive, Storages, index_bytes
from anycard.pickles.composite import Composite, Packed
from anycard.pickles.machine import read_pickle
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_MOST_CODE = 256 << 20  # bytes of code that are looked at
_MOST_LINE = 1_000
_CLASS = re.compile(r"^class (\w+)\((\w*)\):\s*$")
_WORDS = {"None": None, "True": True, "False": False}
_NAMES = re.compile(r'"((?:[^"\\]|\\.)*)("|\\?$)')  # to the end where one is not closed, so that each is passed once
_FINAL = re.compile(r"^  (\w+) : Final\[.*\] = (.+)$")


class _Class:
    """What a class's head says.

    Attributes:
        parameters, buffers: Names; None where the class is of a torch that did not write them.
        final: Constant attributes (kernel sizes, …), as far as they are literals.
    """

    def __init__(self) -> None:
        self.parameters: list[str] | None = None
        self.buffers: list[str] | None = None
        self.final: dict[str, Any] = {}

    def line(self, line: str) -> None:
        """Take one line of the class."""
        if len(line) > _MOST_LINE and not line.startswith("  __"):
            return
        if line.startswith("  __parameters__ = ["):
            self.parameters = _names(line)
        elif line.startswith("  __buffers__ = ["):
            self.buffers = _names(line)
        elif found := _FINAL.match(line):
            with contextlib.suppress(ValueError):
                self.final[found[1]] = _literal(found[2])


def _names(line: str) -> list[str]:
    return [name for name, end in _NAMES.findall(line) if end == '"']


def _literal(text: str) -> Any:
    """A number, a text without escapes, None, a bool, or a flat tuple or list of them; ValueError for the rest."""
    if text[0] in "([" and text[-1] in ")]":
        parts = [part for part in text[1:-1].split(", ") if part]
        values = [_plain(part.rstrip(",")) for part in parts]
        return tuple(values) if text[0] == "(" else values
    return _plain(text)


def _plain(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if len(text) >= 2 and text[0] == text[-1] == '"' and not set('"\\') & set(text[1:-1]):
        return text[1:-1]
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def read_index(archive: Archive) -> Index:
    """The index of a TorchScript archive: the module as the tree, tensors that its code uses below `CONSTANTS`.

    Raises:
        FormatError: Damaged.
    """
    tree = _read(archive, "", Storages(archive), Storages(archive, "constants/"), "code/")
    return Index("TorchScript", tree, archive.source, records=archive.records)


def read_packaged(archive: Archive, number: str) -> Any:
    """A module within a torch package, or None where it is not there; its storages are the package's."""
    folder = f".data/ts_code/{number}/"
    if archive.find(folder + "data.pkl") is None:
        return None
    storages = Storages(archive, ".data/")
    return _read(archive, folder, storages, storages, ".data/ts_code/code/")


def _read(archive: Archive, folder: str, storages: Storages, others: Storages, code: str) -> Any:
    tree = _pickle(archive, folder + "data.pkl", storages)
    _Modules(archive, code).rebuild(tree)
    name = folder + "constants.pkl"
    constants = _pickle(archive, name, others) if archive.find(name) else ()
    if isinstance(constants, tuple) and constants and isinstance(tree, Inert) and isinstance(tree.state, dict):
        tree.state.setdefault("CONSTANTS", {f"c{number}": value for number, value in enumerate(constants)})
    return tree


def _pickle(archive: Archive, name: str, storages: Storages) -> Any:
    record = archive.record(name)
    data = index_bytes(archive, record)
    return read_pickle(data, persistent_load=storages.load, limits=archive.limits, base=record.offset)[0]


class _Modules:
    """Gives script objects the state that a pickled `nn.Module` has."""

    def __init__(self, archive: Archive, code: str) -> None:
        self._archive = archive
        self._code = code
        self._files: dict[str, dict[str, _Class]] = {}
        self._left = _MOST_CODE

    def rebuild(self, root: Any) -> None:
        """The root and every module below it."""
        stack, seen = [root], set()
        while stack:
            obj = stack.pop()
            if id(obj) in seen or not isinstance(obj, Inert) or not isinstance(obj.state, dict):
                continue
            seen.add(id(obj))
            head = self._head(obj)
            if head is not None:
                stack += _sorted_out(obj, obj.state, head, self._head)

    def _head(self, obj: Any) -> _Class | None:
        """The head of an object's class, or None where it is no module."""
        if not isinstance(obj, Inert) or not type(obj).module.startswith("__torch__"):
            return None
        module = type(obj).module
        if module not in self._files:
            self._files[module] = self._read(module)
        return self._files[module].get(type(obj).name)

    def _read(self, module: str) -> dict[str, _Class]:
        record = self._archive.find(f"{self._code}{module.replace('.', '/')}.py")
        if record is None:
            return {}
        self._left -= record.nbytes
        if self._left < 0:
            raise FormatError(f"the archive has more than {_MOST_CODE:,} bytes of code", offset=record.offset)
        text = index_bytes(self._archive, record).decode("utf-8", "replace")
        classes: dict[str, _Class] = {}
        current: _Class | None = None
        for line in text.split("\n"):
            if found := _CLASS.match(line):
                current = classes.setdefault(found[1], _Class()) if found[2] == "Module" else None
            elif current is not None and line.startswith("  def "):
                current = None
            elif current is not None:
                current.line(line)
        return classes


def _is_tensor(value: Any) -> bool:
    """Also one that is listed by its parts."""
    return isinstance(value, TensorInfo) or (isinstance(value, Composite) and not isinstance(value, Packed))


def _parameter(value: Any) -> Any:
    return value.replace(parameter=True) if isinstance(value, TensorInfo) else value


def _sorted_out(obj: Inert, held: dict[Any, Any], head: _Class, head_of: Any) -> list[Any]:
    """Attributes become parameters, buffers, modules and the rest; gives the modules."""
    parameters = head.parameters or []
    tensors = {n: v for n, v in held.items() if _is_tensor(v)}
    buffers = [n for n in tensors if n not in parameters] if head.buffers is None else head.buffers
    modules = {n: v for n, v in held.items() if head_of(v) is not None}
    groups: dict[str, Any] = {
        "_parameters": {n: _parameter(tensors[n]) for n in parameters if n in tensors},
        "_buffers": {n: tensors[n] for n in buffers if n in tensors},
        "_modules": modules,
    }
    taken = {name for group in groups.values() for name in group}
    rest = {n: v for n, v in held.items() if n not in taken and n not in groups}
    obj.state = {**head.final, **rest, **groups}
    return list(modules.values())
