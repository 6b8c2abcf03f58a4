"""A wrong argument is refused in words that say what was given and what is meant, before anything is changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import unchanged

Call = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of weights and one of a whole model."""
    anycard.save(nn.Linear(2, 2), tmp_path / "a.pth")
    anycard.save(nn.Linear(2, 2), tmp_path / "whole.pt", whole=True)
    return tmp_path


def opened(path: Path, what: Callable[[anycard.Checkpoint], Any]) -> Any:
    with anycard.open(path) as ckpt:
        return what(ckpt)


KEYED: dict[str, Call] = {
    "read": anycard.read,
    "load": lambda path, **given: anycard.load(path, nn.Linear(2, 2), **given),
    "load a whole model": lambda path, **given: anycard.load(path.parent / "whole.pt", **given),
    "plan": lambda path, **given: anycard.plan(path, nn.Linear(2, 2), **given),
    "diff": lambda path, **given: anycard.diff(path, path, **given),
    "convert to a zip": lambda path, **given: anycard.convert(path, path.parent / "b.pt", **given),
    "convert": lambda path, **given: anycard.convert(path, path.parent / "b.safetensors", **given),
}
OF_OPEN: dict[str, Call] = {
    "weights": lambda path, **given: opened(path, lambda ckpt: ckpt.weights(**given)),
    "fingerprint": lambda path, **given: opened(path, lambda ckpt: ckpt.fingerprint(**given)),
}
MEMBERS: dict[str, Call] = {**KEYED, "open": anycard.open, "verify": anycard.verify}


@pytest.mark.parametrize("name", [*KEYED, *OF_OPEN])
def test_a_key_is_text(folder: Path, name: str) -> None:
    """Of every verb that takes one; no file is made."""
    with pytest.raises(TypeError, match=r"^key is a text that says which state dict in the file, or None, not 3$"):
        {**KEYED, **OF_OPEN}[name](folder / "a.pth", key=3)
    assert sorted(path.name for path in folder.iterdir()) == ["a.pth", "whole.pt"]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_text(folder: Path, name: str) -> None:
    """Of every verb that takes one."""
    with pytest.raises(TypeError, match=r"^member is a text that says which file in the file, or None, not 3$"):
        MEMBERS[name](folder / "a.pth", member=3)


PROGRESS: dict[str, Call] = {
    "save": lambda path, **given: anycard.save(nn.Linear(2, 2), path, **given),
    "fingerprint": OF_OPEN["fingerprint"], "verify": anycard.verify, "read": anycard.read,
    "convert": lambda path, **given: anycard.convert(path.parent / "whole.pt", path, **given),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRESS)
@pytest.mark.parametrize("odd", ["bar", 1])
def test_a_wrong_progress_changes_no_file(folder: Path, name: str, odd: object) -> None:
    """It is looked at first."""
    before = (folder / "a.pth").read_bytes()
    with pytest.raises(TypeError, match=r"progress is True for a bar, a function of \(done, total\) bytes, or None"):
        PROGRESS[name](folder / "a.pth", progress=odd)
    assert (folder / "a.pth").read_bytes() == before


def test_a_wrong_progress_changes_no_model(folder: Path) -> None:
    """It is looked at before the model is filled."""
    model = nn.Linear(2, 2)
    with unchanged(model), pytest.raises(TypeError, match="progress is True for a bar"):
        anycard.load(folder / "a.pth", model, progress="bar")  # type: ignore[call-overload]


def test_allow_takes_names(folder: Path) -> None:
    """None means none; a number is no list of names; a class is told by the name to give."""
    assert isinstance(anycard.load(folder / "whole.pt", allow=None), nn.Linear)
    assert anycard.scan(folder / "a.pth", allow=None).clean
    for call in (lambda allow: anycard.load(folder / "whole.pt", allow=allow),
                 lambda allow: anycard.load(folder / "a.pth", nn.Linear(2, 2), allow=allow),
                 lambda allow: anycard.scan(folder / "a.pth", allow=allow)):  # fmt: skip
        with pytest.raises(TypeError, match=r"allow is a name such as 'package.module.Class', or a list of them"):
            call(3)
        with pytest.raises(TypeError, match=r"allow takes names such as 'pathlib\w*.Path', not a type"):
            call([Path])


def test_only_and_rename_are_told(folder: Path) -> None:
    """What they may be is said."""
    model = nn.Linear(2, 2)
    for odd in (3, [3]):
        with pytest.raises(TypeError, match=r"^only is a glob, a list of globs or a function of a name, not"):
            anycard.load(folder / "a.pth", model, only=odd)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"^rename is a mapping, a list of"):
            anycard.load(folder / "a.pth", model, rename=odd)  # type: ignore[call-overload]


def test_rename_takes_compiled_patterns(folder: Path) -> None:
    """As text, a pattern is compiled by us."""
    model = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    anycard.load(folder / "a.pth", model, rename=[(re.compile("^"), "fc.")])
    assert torch.equal(model["fc"].weight, anycard.read(folder / "a.pth")["weight"])


class Bytes:
    """A path that gives bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def test_a_path_is_text(folder: Path) -> None:
    """A path object that gives bytes is refused as bytes are."""
    path: Any = Bytes(folder / "a.pth")
    for call in (anycard.open, anycard.read, anycard.verify, anycard.scan, lambda p: anycard.save(nn.Linear(2, 2), p),
                 lambda p: anycard.convert(p, folder / "b.pt"),
                 lambda p: anycard.convert(folder / "a.pth", p)):  # fmt: skip
        with pytest.raises(TypeError, match="a path is needed whose text is a str: Bytes gives b'"):
            call(path)
    for call in (anycard.scan, lambda p: anycard.convert(folder / "a.pth", p)):
        with pytest.raises(TypeError, match="a path is needed, not 3"):
            call(3)  # type: ignore[arg-type]


def test_swapped_arguments_of_save(tmp_path: Path) -> None:
    """The order is said, and not the whole model printed."""
    with pytest.raises(TypeError) as caught:
        anycard.save(str(tmp_path / "s.pt"), nn.Sequential(nn.Linear(2, 2)))  # type: ignore[arg-type]
    wanted = "save takes a path or an open binary file, not a Sequential; the object comes first: save(model, path)"
    assert str(caught.value) == wanted
