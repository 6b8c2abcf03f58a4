"""Interrupts while helpers are at work: when a call has ended, nothing goes on writing."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import anycard

needs_signals = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to a thread")
WEIGHTS = {str(index): torch.full((1 << 15,), float(index)) for index in range(12)}


class Slow:
    """A progress function that takes its time in the helpers, and notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, done: int, total: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        self.times.append(time.monotonic())


class Interrupting(Slow):
    """Interrupts the main thread, twice, from within a helper's slow work."""

    left = 2

    def __call__(self, done: int, total: int) -> None:
        time.sleep(0.02)  # so that each thread has its turn
        while self.left and threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
            self.left -= 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        super().__call__(done, total)


def interrupted(path: Path, progress: Slow) -> float:
    """Save, which is interrupted and leaves no file; gives when it ended, a while ago."""
    with pytest.raises(KeyboardInterrupt):
        anycard.save(WEIGHTS, path, progress=progress)
    ended = time.monotonic()
    time.sleep(0.3)
    assert not list(path.parent.iterdir())
    return ended


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_interrupt_right_after_a_helper_started(tmp_path, monkeypatch, suffix):
    """It is waited for."""
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        begin(thread)
        time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    slow = Slow()
    ended = interrupted(tmp_path / f"a{suffix}", slow)
    assert slow.times and max(slow.times) <= ended


def test_an_interrupt_before_a_helper_really_runs(tmp_path, monkeypatch):
    """It does nothing once it runs."""
    begin = threading.Thread.start
    late: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        late.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    slow = Slow()
    interrupted(tmp_path / "a.pth", slow)
    for thread in late:
        begin(thread)
        thread.join()
    assert late and not slow.times


@needs_signals
def test_interrupts_while_a_helper_is_waited_for(tmp_path):
    """Ctrl-C as Python raises it, once in the main thread's own work, once while it waits: the helper is waited for."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    slow = Interrupting()
    try:
        ended = interrupted(tmp_path / "a.pth", slow)
    finally:
        signal.signal(signal.SIGINT, before)
    assert max(slow.times) <= ended and slow.left == 0
