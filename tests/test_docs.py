"""The documents say what the code does, in both languages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import anycard
from anycard.cli.main import VERBS

ROOT = Path(__file__).parent.parent
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))


def blocks(text: str) -> list[str]:
    """Code blocks, without comments."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s*#.*", "", block) for block in found]


def test_both_readmes_have_the_same_code() -> None:
    """Code blocks, commands and the lines of the tutorial's table are the same in both languages."""
    english = [block.replace("<this repository>", "<>") for block in blocks(README)]
    assert english == [block.replace("<本仓库>", "<>") for block in blocks(CHINESE)]
    assert README.count("\n| ") == CHINESE.count("\n| ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_both_readmes(verb: str) -> None:
    """No command without a line in the documents."""
    assert f"`anycard {verb}" in README
    assert f"`anycard {verb}" in CHINESE


def test_the_counts_are_those_of_the_printed_run() -> None:
    """What the READMEs say of the matrix is what docs/matrix.txt, a printed run, says."""
    printed = (ROOT / "docs/matrix.txt").read_text(encoding="utf-8")
    for line in re.findall(r"^(?:anycard|plain PyTorch): \d+ of \d+ cells exact", README, re.MULTILINE):
        assert line in printed
        assert line in CHINESE


def test_the_fingerprint_can_be_computed_by_the_page(tmp_path: Path) -> None:
    """The code on docs/fingerprint.md gives what anycard gives."""
    page = (ROOT / "docs/fingerprint.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    weights = {"é.w": torch.rand(2, 3), "b": torch.arange(4), "a": torch.tensor(2.5)}
    anycard.save(weights, tmp_path / "a.safetensors")
    held = {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numpy().tobytes()) for name, t in weights.items()
    }
    with anycard.open(tmp_path / "a.safetensors") as ckpt:
        assert ckpt.fingerprint() == names["fingerprint"](held)


def test_links_lead_somewhere() -> None:
    """Every relative link in the documents names a file that is there."""
    for file in (ROOT / "README.md", ROOT / "README.zh.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), (file.name, target)
