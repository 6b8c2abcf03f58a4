"""Imports point one way, torch stays at its edge, and the public names are what `__all__` says."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anycard

ROOT = Path(anycard.__file__).parent
GROUND = ("errors", "tensors", "limits", "version", "warning", "progress", "collection", "arguments", "needs_torch")
# Lowest first; rooms on one floor do not know each other.
FLOORS = (GROUND, ("disk",), ("containers", "pickles"), ("names",), ("formats", "plans"), ("checkpoint",),
          ("operations",), ("torch",), ("matrix",), ("cli",))  # fmt: skip
# A method that hands over to a higher floor, imported where it is called.
UPWARD = {("checkpoint", "torch"), ("checkpoint", "operations")}
FILES = sorted(ROOT.rglob("*.py"))


def floor(room: str) -> int:
    """How high a room lies."""
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


def room_of(file: Path) -> str:
    """The folder or top-level module that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether at its top."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.unparse(node.test)
            and "not" not in ast.unparse(node.test)
        ):
            node.body = []  # names for annotations: nothing is imported when the program runs
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), id(node) in top


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    """A room imports from itself and from lower floors only, and torch only at its edge and above."""
    here = room_of(file)
    if here in ("__init__", "__main__"):
        return
    for module, at_top in imports(file):
        if module.split(".")[0] == "torch":
            assert floor(here) >= floor("torch"), f"{file.name} imports torch"
        if not module.startswith("anycard."):
            continue
        there = module.split(".")[1]
        if there != here and not (not at_top and (here, there) in UPWARD):
            assert floor(there) < floor(here), f"{file.name} imports {module}"


def test_no_module_is_called_like_a_public_function() -> None:
    """With lazy names an imported module of that name would take the function's place."""
    rooms = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    assert not {name for name in anycard.__all__ if callable(getattr(anycard, name))} & rooms


def test_public_names_are_there_and_documented() -> None:
    """Every name in `__all__` exists, says that it lives in anycard, and has a docstring."""
    assert sorted(anycard.__all__) == list(anycard.__all__)
    for name in anycard.__all__:
        value = getattr(anycard, name)
        if inspect.isclass(value):
            assert value.__module__ == "anycard", name
        if callable(value):
            assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="nothing"):
        _ = anycard.nothing  # type: ignore[attr-defined]


def test_importing_is_light() -> None:
    """`import anycard` and the command line's help bring in no torch, numpy, rich or click before they are used."""
    code = "import sys, anycard; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"torch", "numpy", "rich", "click", "blake3", "zlib_ng", "pathlib", "dataclasses", "typing", "pickle"}
    assert not heavy & set(loaded) - set(_bare())


def _bare() -> list[str]:
    code = "import sys; print(*{m.split('.')[0] for m in sys.modules})"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_files_are_short() -> None:
    """No source file has more than 400 lines."""
    long = {f.name: n for f in FILES if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
