"""Whole models, rebuilt: what the objects are made of that they keep."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, assert_same_bits, everything, filled
from test_rebuilding import HERE as THERE
from test_rebuilding import Holder, plainly, saved

HERE = __name__


def rebuilt(model: Any, *allow: str, **options: Any) -> Any:
    """What anycard makes of it, with every class of this file allowed."""
    return anycard.load(saved(model, **options), allow=[HERE, THERE, *allow])


class Slotted:
    """Has no `__dict__`."""

    __slots__ = ("a", "b")


class Counting(list):  # type: ignore[type-arg]
    """Its state is taken when its items are there."""

    def __setstate__(self, state: Any) -> None:
        self.seen = len(self)


class Sized(nn.Module):
    """Its `__new__` takes an argument by name."""

    def __new__(cls, *, width: int) -> Any:
        made = super().__new__(cls)
        object.__setattr__(made, "given", width)
        return made

    def __init__(self, *, width: int) -> None:
        super().__init__()

    def __getnewargs_ex__(self) -> Any:
        return (), {"width": 3}


class Around(nn.Module):
    """Is made by a call that takes its module."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.sign = inside, -1

    def __reduce__(self) -> Any:
        return Around, (self.inside,)


class Forgetful(nn.Module):
    """Leaves out what its `__init__` asks for."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def __getstate__(self) -> Any:
        return {name: value for name, value in vars(self).items() if name != "config"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.config


def test_objects_with_slots_only() -> None:
    """One that has no `__dict__` at all."""
    held = Slotted()
    held.a, held.b = 1, torch.ones(2)
    made = rebuilt(Holder(held)).held
    assert type(made) is Slotted and made.a == 1
    assert_same_bits(made.b, held.b)


def test_items_come_before_the_state() -> None:
    """As pickle has it, so that a class's `__setstate__` finds them."""
    held = Counting([1, 2])
    held.seen = 0
    assert rebuilt(Holder(held)).held.seen == plainly(Holder(held)).held.seen == 2


def test_new_takes_arguments_by_name() -> None:
    """What `__getnewargs_ex__` gave."""
    assert rebuilt(Sized(width=3), pickle_protocol=4).given == 3


def test_a_call_that_takes_a_module_is_no_wrapper() -> None:
    """It has to be allowed by name, and gives what it makes; the module in it does not take its place."""
    model = filled(nn.Sequential(Around(nn.Linear(2, 2))))
    with pytest.raises(anycard.UntrustedError, match=r"Around"):
        rebuilt(model)
    made = rebuilt(model, f"{HERE}.Around")
    assert made[0].sign == -1
    assert_same(everything(made), everything(model))


def test_a_class_that_chooses_its_state() -> None:
    """What it left out is said, and refused no more than plain PyTorch refuses it."""
    with pytest.warns(UserWarning, match=r"lacks Forgetful\.config"):
        made = rebuilt(Forgetful(3))
    assert not hasattr(made, "config") and not hasattr(plainly(Forgetful(3)), "config")


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.array(3), np.zeros((0, 2), "u4"), np.array([1, "a", None], dtype=object),
     np.array(["a", "bc"]), np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]), np.array(["2020-01-01"], dtype="M8[D]")],
)  # fmt: skip
def test_arrays_stay_arrays(array: Any) -> None:
    """numpy's, of dtypes that torch has and of others."""
    made = rebuilt(Holder(array), "numpy.ndarray", "numpy.dtype").held
    assert type(made) is np.ndarray and (made.dtype, made.shape) == (array.dtype, array.shape)
    assert made.tolist() == array.tolist() and made.flags.writeable


def test_a_state_dict_keeps_its_versions() -> None:
    """A state dict among a model's attributes has its `_metadata`."""
    state = nn.BatchNorm1d(2).state_dict()
    assert rebuilt(Holder(state)).held._metadata == state._metadata  # type: ignore[attr-defined]


def test_a_tuple_that_holds_itself() -> None:
    """By way of a list: one tuple, as it was."""
    held: tuple[list[Any], int] = ([], 1)
    held[0].append(held)
    made = rebuilt(Holder(held)).held
    assert made[0][0] is made


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_storages() -> None:
    """A storage by itself shares its memory with the tensors that are views of it."""
    tensor = torch.arange(4.0)
    made = rebuilt(Holder([tensor.storage(), tensor[2:]])).held
    assert type(made[0]) is torch.storage.TypedStorage and made[0].tolist() == [0, 1, 2, 3]
    made[0][2] = 7
    assert made[1].tolist() == [7, 3]
    with pytest.raises(anycard.CheckpointError, match="held"):
        anycard.save(Holder(tensor.untyped_storage()), io.BytesIO(), whole=True)


def test_a_model_that_nests_too_deep() -> None:
    """A CheckpointError, with another way."""
    model: nn.Module = nn.Linear(1, 1)
    limit = sys.getrecursionlimit()
    for _ in range(limit // 7):
        model = nn.Sequential(model)
    sys.setrecursionlimit(limit * 20)
    try:
        file = saved(model)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(anycard.CheckpointError, match="deeper") as caught:
        anycard.load(file)
    assert not isinstance(caught.value, anycard.FormatError)
