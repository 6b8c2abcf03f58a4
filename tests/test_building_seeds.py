"""A factory that seeds torch's default generator itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import init

import anycard
from helpers import assert_same_bits, bits, draws_nothing, filled, quiet


def fixed(*shape: int) -> torch.Tensor:
    return init.normal_(torch.empty(*shape))


def in_a_fork(seed: int | None) -> torch.Tensor:
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        return fixed(3)


def after_a_set_state() -> torch.Tensor:
    before = torch.get_rng_state()
    torch.set_rng_state(torch.Generator().manual_seed(7).get_state())
    tensor = init.trunc_normal_(torch.empty(3))
    torch.set_rng_state(before)
    return tensor


def seeded(seed: int, *more: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    for parameter in more:
        parameter.detach().clone()  # has to be drawn, and not from what was seeded
    return torch.cat([fixed(3), torch.empty(3).uniform_(), torch.rand(2)])


SEEDED: dict[str, Callable[[torch.Tensor], Any]] = {
    "fork": lambda w: in_a_fork(0),
    "two forks": lambda w: torch.cat([in_a_fork(0), in_a_fork(0), in_a_fork(1)]),
    "the caller's own seed": lambda w: torch.cat([in_a_fork(5), in_a_fork(5)]),
    "no fork": lambda w: seeded(0),
    "no fork, twice": lambda w: torch.cat([seeded(5), seeded(5)]),
    "what was put off is read": lambda w: seeded(5, w),
    "state": lambda w: after_a_set_state(),
    "the generator's own method": lambda w: torch.default_generator.manual_seed(5) and fixed(3),
    "the generator given": lambda w: init.normal_(torch.empty(3), generator=torch.manual_seed(5)),
    "orthogonal": lambda w: torch.manual_seed(5) and init.orthogonal_(torch.empty(3, 3)),
    "a weight that the file lacks": lambda w: torch.manual_seed(5) and nn.Linear(3, 3).weight.detach(),
    "initial seed": lambda w: torch.randn(3, generator=torch.Generator().manual_seed(torch.initial_seed())),
}


@pytest.mark.parametrize("drawn_before", [False, True])
@pytest.mark.parametrize("kind", SEEDED)
def test_what_init_seeds_comes_out_as_seeded(tmp_path, kind, drawn_before):
    """A buffer that __init__ draws from a seed of its own has the same values after each load as in plain torch."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(init.normal_(torch.empty(4)))
            self.register_buffer("fixed", SEEDED[kind](self.weight), persistent=False)

    torch.save({"weight": torch.ones(4)}, tmp_path / "a.pth")
    torch.manual_seed(5)
    want = Model()
    for _ in range(2):
        torch.manual_seed(5)
        if drawn_before:
            torch.rand(3)
        loaded = anycard.load(tmp_path / "a.pth", Model)
        assert_same_bits(loaded.fixed, want.fixed)
        assert_same_bits(loaded.weight.detach(), torch.ones(4))


def test_a_fork_leaves_the_callers_generator_as_it_was(tmp_path):
    """What the file fills draws nothing before, in and after a fork that __init__ seeds; nor does the seed change."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3))
        in_a_fork(5)
        return model.append(nn.Linear(3, 3))

    anycard.save(filled(build()), tmp_path / "a.pth")
    torch.manual_seed(5)
    with draws_nothing():
        anycard.load(tmp_path / "a.pth", build)
        with pytest.raises(ZeroDivisionError):
            anycard.load(tmp_path / "a.pth", lambda: [build(), 1 // 0])
        anycard.load(tmp_path / "a.pth", lambda: anycard.load(tmp_path / "a.pth", build))
    assert torch.initial_seed() == 5


def test_heads_differ_though_init_seeds(tmp_path):
    """A head that the file lacks comes from the caller's generator, also where __init__ seeds after it."""

    def build() -> nn.Module:
        model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
        torch.manual_seed(0)
        return model

    anycard.save({f"body.{k}": v for k, v in nn.Linear(3, 3).state_dict().items()}, tmp_path / "a.pth")
    heads = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        with quiet():
            heads.append(bits(anycard.load(tmp_path / "a.pth", build, strict=False)["head"].weight))
    assert heads[0] != heads[1]
    assert heads[0] == heads[2]


def test_loads_in_threads_leave_the_seed(tmp_path):
    """Loads that overlap, and end in the order they began, draw nothing and leave the generator's seed."""
    anycard.save(filled(nn.Linear(3, 3)), tmp_path / "a.pth")
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> nn.Module:
        model = nn.Linear(3, 3)
        inside.set()
        assert go_on.wait(60)
        return model

    torch.manual_seed(5)
    with draws_nothing():
        thread = threading.Thread(target=anycard.load, args=(tmp_path / "a.pth", slow))
        thread.start()
        assert inside.wait(60)

        def quick() -> nn.Module:
            go_on.set()
            thread.join()
            return nn.Linear(3, 3)

        anycard.load(tmp_path / "a.pth", quick)
    assert torch.initial_seed() == 5
