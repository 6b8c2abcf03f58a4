"""A bar with bytes and rate on a terminal, for work of more than a second; a function's totals; nothing in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from anycard.progress import Progress

WORK = """
import time
from anycard.progress import counting
with counting(True, 3_000_000) as done:
    done(1_000_000)
    time.sleep({seconds})
    for _ in range(4):
        done(250_000)
        time.sleep({seconds} / 10)
"""


def on_a_terminal(code: str) -> str:
    """What a program writes to a terminal."""
    pty = pytest.importorskip("pty", reason="a terminal to write to")
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, check=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return shown.decode()


def test_long_work_shows_bytes_and_rate() -> None:
    shown = on_a_terminal(WORK.format(seconds=1.1))
    assert "2.0/3.0 MB" in shown and "/s" in shown


def test_short_work_shows_nothing() -> None:
    assert on_a_terminal(WORK.format(seconds=0)) == ""


def test_a_pipe_gets_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", WORK.format(seconds=1.1)], capture_output=True, check=True)
    assert (result.stdout, result.stderr) == (b"", b"")


SHELL = "import builtins\nbuiltins.get_ipython = type({name!r}, (), {{}})\n"  # as IPython gives itself to its cells


def test_a_notebook_shows_a_bar() -> None:
    """It shows what goes to stderr, which is no terminal; where IPython runs in a pipe, nobody would see it."""
    for name, seen in (("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)):
        code = SHELL.format(name=name) + WORK.format(seconds=1.1)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
        assert (result.stdout, "2.0/3.0 MB" in result.stderr, result.stderr == "") == ("", seen, not seen)


@pytest.mark.parametrize("stream", ["None", "open(sys.argv[1], 'w')", "Log()"])
def test_any_stderr_will_do(tmp_path: Path, stream: str) -> None:
    """None, as below pythonw, a file, and a logger without `isatty`."""
    anycard.save(nn.Linear(2, 2), tmp_path / "a.pth")
    log = "class Log:\n write = flush = lambda *given: None\n"
    code = f"{log}import sys, anycard; sys.stderr = {stream}; print(anycard.verify(sys.argv[2], progress=True).ok)"
    command = [sys.executable, "-c", code, str(tmp_path / "log"), str(tmp_path / "a.pth")]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "True\n"


class Tied(nn.Module):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(30, 30), nn.Linear(30, 30)
        self.b.weight = self.a.weight


class Asked(nn.Linear):
    """Computes while it is loaded, so it is called with real tensors."""

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        self.seen = float(state[prefix + "bias"].sum())
        super()._load_from_state_dict(state, prefix, *rest)


LOADS: dict[str, Callable[[Path, Progress], object]] = {
    "tied": lambda path, note: anycard.load(path, Tied(), progress=note),
    "tied, built": lambda path, note: anycard.load(path, Tied, progress=note),
    "tied, read": lambda path, note: anycard.read(path, progress=note),
    "tied, converted": lambda path, note: anycard.convert(path, path.parent / "b.safetensors", progress=note),
    "mapped": lambda path, note: anycard.load(path, Tied, mmap=True, progress=note),
    "called": lambda path, note: anycard.load(path, nn.ModuleDict({"a": Asked(30, 30), "b": nn.Linear(30, 30)}),
                                              progress=note),
    "in part": lambda path, note: anycard.load(path, nn.ModuleDict({"a": nn.Linear(30, 30)}), strict=False,
                                               progress=note),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADS)
def test_a_function_sees_the_end(tmp_path: Path, name: str) -> None:
    """Tied tensors count once, mapped ones and those of modules that are called count too."""
    anycard.save(Tied(), tmp_path / "a.pth")
    calls: list[tuple[int, int]] = []
    LOADS[name](tmp_path / "a.pth", lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1] > 0
    if name == "tied":
        assert calls[-1][1] == 4 * (30 * 30 + 2 * 30)


def test_a_function_sees_all_objects_as_one(tmp_path: Path) -> None:
    """Of a dict of objects there is one total."""
    objects = {"a": nn.Linear(30, 30), "b": nn.Linear(20, 20)}
    calls: list[tuple[int, int]] = []
    anycard.save(objects, tmp_path / "a.ckpt")
    anycard.load(tmp_path / "a.ckpt", objects, progress=lambda done, total: calls.append((done, total)))
    total = 4 * (30 * 30 + 30 + 20 * 20 + 20)
    assert calls == sorted(calls) and calls[-1] == (total, total)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_function_gets_the_bytes(tmp_path: Path, name: str) -> None:
    """Of a save, a load, a conversion and both kinds of check: monotone, and all of them in the end."""
    model, path, other = nn.Linear(300, 300), tmp_path / name, tmp_path / f"other-{name}"
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    calls: list[tuple[int, int]] = []

    def note(done: int, of: int) -> None:
        calls.append((done, of))

    works: list[Callable[[], object]] = [
        lambda: anycard.save(model, path, progress=note),
        lambda: anycard.load(path, model, progress=note),
        lambda: anycard.read(path, progress=note),
        lambda: anycard.convert(path, other, progress=note),
        lambda: anycard.verify(path, progress=note),
    ]
    for work in works:
        calls.clear()
        work()
        assert calls[-1] == (total, total)
        assert calls == sorted(calls)
    assert torch.equal(anycard.read(other)["weight"], model.weight)
