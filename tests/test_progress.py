"""A bar with bytes and rate on a terminal, for work of more than a second; a function's totals; nothing in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import anycard

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
