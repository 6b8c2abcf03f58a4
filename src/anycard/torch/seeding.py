"""Whether torch's default generator, while a factory runs, still is where its caller left it, but for draws.

`torch.manual_seed`, `set_rng_state` and `fork_rng` are seen by no mode. Each sets the seed that the generator
remembers and draws nothing from; so while a factory runs, that seed carries a mark in its upper half. Its lower
half, which is all that seeds the CPU's generator, stays as it is, and the numbers drawn are the same.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class _Mark:
    """The mark that all factories share that run at one time, in any thread."""

    def __init__(self) -> None:
        self.users = 0
        self.seed = 0
        self.marked = 0
        self.lock = threading.Lock()

    def take(self) -> None:
        with self.lock:
            if not self.users:
                self.seed = torch.default_generator.initial_seed()
                self.marked = self.seed ^ (1 + secrets.randbits(31) << 32)
                _remember(self.marked)
            self.users += 1

    def give_back(self) -> None:
        with self.lock:
            self.users -= 1
        self.clear()

    def clear(self) -> None:
        """Take the mark away, where no factory runs."""
        with self.lock:
            if not self.users and torch.default_generator.initial_seed() == self.marked:
                _remember(self.seed)


def _remember(seed: int) -> None:
    state = torch.default_generator.get_state()
    state.numpy()[:8].view(np.uint64)[0] = seed
    torch.default_generator.set_state(state)


_MARK = _Mark()


@contextmanager
def forked() -> Iterator[None]:
    """`torch.random.fork_rng` for the CPU, which does not bring back the mark of a factory that has ended meanwhile."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        _MARK.clear()


class CallersDraws:
    """The caller's random numbers, for one factory.

    Attributes:
        replaced: At the end of the factory the generator was not the caller's any more.
    """

    def __init__(self) -> None:
        self.replaced = False
        self._began = torch.default_generator.get_state()
        self._own: torch.Tensor | None = None
        self._running = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this block `are_replaced` can tell."""
        _MARK.take()
        self._running = True
        try:
            yield
        finally:
            self.replaced, self._running = self.are_replaced(), False
            _MARK.give_back()

    def are_replaced(self) -> bool:
        """The default generator was seeded, or its state set, since the factory began; not so after a `fork_rng`."""
        return torch.default_generator.initial_seed() != _MARK.marked if self._running else self.replaced

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Within this block the default generator gives the caller's numbers, and others' it keeps.

        Where it was replaced, they are a sequence of their own that begins with what the caller's gave next.
        """
        if not self.are_replaced():
            yield
            return
        generator = torch.default_generator
        others = generator.get_state()
        if self._own is None:
            generator.set_state(self._began)
            generator.manual_seed(int(torch.empty((), dtype=torch.int64, device="cpu").random_()))
        else:
            generator.set_state(self._own)
        try:
            yield
        finally:
            self._own = generator.get_state()
            generator.set_state(others)
