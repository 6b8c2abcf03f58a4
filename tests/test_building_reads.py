"""What `__init__` reads of the tensors that it makes, while their initialisation is put off."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same_bits, quiet


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def seven(n: int = 499) -> torch.Tensor:
    return torch.empty(n).fill_(7.0)


def drawn(n: int = 499) -> torch.Tensor:
    return torch.empty(n).random_(3, 90)


def exported(export: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """A tensor that is drawn once something else has its memory."""
    tensor = torch.empty(499)
    seen = export(tensor)
    tensor.random_(3, 90)
    return torch.as_tensor(seen).clone() if seen is not None else tensor.clone()


def through_address(tensor: torch.Tensor) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float)), tensor.shape)


def over_numpy() -> torch.Tensor:
    """A tensor that is drawn over an array's memory."""
    array = np.zeros(499, np.float32)
    torch.from_numpy(array).random_(3, 90)
    return torch.tensor(array.copy())


def held(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


READS: dict[str, Callable[[], Any]] = {
    "index by tensor": lambda: seven(500)[torch.arange(499)],
    "drawn, index by tensor": lambda: drawn(500)[torch.arange(499)],
    "index by list": lambda: drawn(500)[list(range(499))],
    "index by mask": lambda: drawn(500)[torch.arange(500) > 3],
    "index": lambda: torch.arange(90.0)[torch.empty(5, dtype=torch.long).random_(3, 90)],
    "index in a tuple": lambda: torch.eye(90)[1:, torch.empty(5, dtype=torch.long).random_(3, 90)],
    "slice's end": lambda: torch.arange(90.0)[: torch.empty(1, dtype=torch.long).random_(3, 90)[0]],
    "masked": lambda: torch.arange(499.0)[drawn() > 40],
    "assigned": lambda: torch.zeros(499).index_put_((torch.arange(499),), drawn()),
    "set by": lambda: torch.zeros(2, 499).__setitem__(0, drawn()) or drawn(),
    "out": lambda: torch.add(drawn(), 1, out=drawn()),
    "view": lambda: drawn()[3:].view(16, 31).t()[2] + 0,
    "in a dict": lambda: (
        torch.func.functional_call(nn.Linear(3, 3), {"weight": drawn(9).view(3, 3)}, torch.ones(3)) * 0
    ),
    "scripted": lambda: scripted(seven()),
    "scripted index": lambda: scripted(seven()[torch.arange(9)]),
    "torch.ops": lambda: torch.ops.aten.mul(drawn(), 2),
    "torch.ops overload": lambda: torch.ops.aten.mul.Tensor(drawn(), drawn()),
    "vmap": lambda: torch.vmap(lambda x: x * 2)(drawn()),
    "vmap closure": lambda: (lambda t: torch.vmap(lambda x: t * x)(torch.ones(2)))(drawn()),
    "grad": lambda: torch.func.grad(lambda x: (x * x).sum())(drawn()),
    "compiled": lambda: torch.compile(lambda x: x * 2, backend="eager")(drawn()),
    "tolist": lambda: torch.tensor(drawn().tolist()),
    "item": lambda: torch.tensor([drawn(1).item(), float(drawn(1)), int(drawn(1))]),
    "iter": lambda: torch.tensor([float(x) for x in drawn(9)]),
    "numpy": lambda: torch.tensor(drawn().numpy() + 1),
    "deepcopy": lambda: copy.deepcopy(drawn()),
    "deepcopy in a list": lambda: copy.deepcopy(held(drawn()))[0],
    "pickle": lambda: pickle.loads(pickle.dumps(drawn())),
    "storage": lambda: torch.tensor(drawn(9).untyped_storage().tolist()),
    "dlpack": lambda: torch.from_dlpack(drawn()).clone(),
    "numpy dlpack": lambda: torch.tensor(np.from_dlpack(drawn()).copy()),
    "sparse": lambda: torch.sparse_coo_tensor(torch.arange(499)[None], drawn(), check_invariants=True).to_dense(),
    "apply_": lambda: (lambda t: torch.zeros(9).apply_(lambda x: float(t[0])))(drawn()),
    "numpy, then drawn": lambda: exported(lambda t: t.numpy()),
    "numpy, then constant": lambda: (lambda t: (t.numpy(), t.fill_(7.0))[0] + 0)(torch.empty(9)),
    "array, then drawn": lambda: exported(np.asarray),
    "address, then drawn": lambda: exported(through_address),
    "dlpack, then drawn": lambda: exported(np.from_dlpack),
    "storage, then drawn": lambda: exported(lambda t: torch.tensor([], dtype=torch.float32).set_(t.untyped_storage())),
    "shared, then drawn": lambda: exported(lambda t: t.share_memory_() is None or None),
    "over numpy": over_numpy,
}


@pytest.mark.parametrize("kind", READS)
def test_nothing_is_read_before_it_is_initialised(tmp_path, kind):
    """Whatever way __init__ reads a tensor that it made, it reads what plain torch has there."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))
            self.register_buffer("read", torch.as_tensor(READS[kind]()), persistent=False)

    torch.save({"weight": torch.ones(4)}, tmp_path / "a.pth")
    torch.manual_seed(3)
    want = Model()
    torch.manual_seed(3)
    with quiet():  # torch.compile tells that it stops at what it does not know
        loaded = anycard.load(tmp_path / "a.pth", Model)
    assert_same_bits(loaded.read, want.read)


def test_what_lies_beside_a_filled_tensor_is_initialised(tmp_path):
    """The file fills half of the memory that was drawn into at once; the model keeps all of it in no buffer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = (torch.empty(500).random_(3, 90),)
            self.weight = nn.Parameter(self.both[0][:250])

    torch.save({"weight": torch.ones(250)}, tmp_path / "a.pth")
    torch.manual_seed(3)
    (want,) = Model().both
    torch.manual_seed(3)
    (got,) = anycard.load(tmp_path / "a.pth", Model).both
    assert_same_bits(got, torch.cat([torch.ones(250), want[250:].detach()]))
