"""What `dtype=` and the casts of a load come to where values do not go straight into place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, assert_same_bits, both, filled, on_meta, refused, unchanged, weights


class Halving(nn.Module):
    """Takes half of what it is given, under the file's name or under an old one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("offset", torch.zeros(3))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[name.replace("old", "weight")] = state.pop(name) / 2
        super()._load_from_state_dict(state, prefix, *rest)


LOADERS: dict[str, Callable[[], nn.Module]] = {
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4)),
    "computing": lambda: nn.Sequential(Halving()),
}


def stored(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if kind == "lazy":
        return {"0.weight": torch.rand(4, 3, dtype=dtype), "0.bias": torch.rand(4, dtype=dtype)}
    return {"0.weight": torch.rand(3, dtype=dtype), "0.offset": torch.rand(3, dtype=dtype)}


@pytest.mark.parametrize("asked", [torch.float64, "auto"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_module_that_is_called_gets_the_dtype_first(tmp_path, kind, asked):
    """No value is rounded to the old dtype on its way into a module that computes; "auto" holds there, too."""
    state = stored(kind, torch.float64)
    torch.save(state, tmp_path / "a.pth")
    want = {name: tensor if kind == "lazy" else tensor / 2 for name, tensor in state.items()}
    for target in (LOADERS[kind], LOADERS[kind](), on_meta(LOADERS[kind])):
        assert_same(weights(anycard.load(tmp_path / "a.pth", target, dtype=asked)), want)


def test_auto_says_where_a_module_that_is_called_keeps_its_dtype(tmp_path):
    """Under another name in the file a tensor's dtype is not known: it keeps its own, and the plan names it."""
    torch.save({"0.old": torch.rand(3).double(), "0.offset": torch.rand(3).double()}, tmp_path / "a.pth")
    notes = "\n".join(anycard.plan(tmp_path / "a.pth", LOADERS["computing"], dtype="auto").notes)
    assert "dtype='auto'" in notes and "0.weight" in notes and "0.offset" not in notes
    loaded = anycard.load(tmp_path / "a.pth", LOADERS["computing"], dtype="auto")
    assert (loaded[0].weight.dtype, loaded[0].offset.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_module_that_was_given_a_dtype_gets_its_own_back(tmp_path, kind, dtype):
    """Something fails after the call: tensors have their old dtype and values, and lazy ones are lazy again."""
    torch.save(stored(kind, torch.float64), tmp_path / "a.pth")
    model = LOADERS[kind]()
    before = copy.deepcopy(model)

    def hook(module: nn.Module, keys: Any) -> None:
        raise ZeroDivisionError

    model.register_load_state_dict_post_hook(hook)
    with pytest.raises((anycard.MismatchError, ZeroDivisionError)):
        anycard.load(tmp_path / "a.pth", model, dtype=dtype)
    held = zip((*model.parameters(), *model.buffers()), (*before.parameters(), *before.buffers()), strict=True)
    for tensor, old in held:
        assert type(tensor) is type(old)
        assert tensor.dtype == torch.float32
        if not nn.parameter.is_lazy(old):
            assert_same_bits(tensor, old)


def trained() -> nn.Module:
    model = filled(nn.Linear(3, 4), 5)
    model(torch.ones(1, 3)).sum().backward()
    return model


def test_gradients_go_along_with_their_parameters(tmp_path):
    """A model in another dtype than before is trained on with the gradients that it had, as after `model.to`."""
    anycard.save(filled(nn.Linear(3, 4)), tmp_path / "a.pth")
    model, other = trained(), trained().double()
    held = model.weight.grad
    anycard.load(tmp_path / "a.pth", model, dtype=torch.float64)
    assert model.weight.grad is held
    assert_same_bits(model.weight.grad, other.weight.grad)
    torch.optim.AdamW(model.parameters()).step()


def test_gradients_come_back_with_their_parameters(tmp_path):
    """A hook raises after the load: gradients have their old dtype again."""
    anycard.save(filled(nn.Linear(3, 4)), tmp_path / "a.pth")
    model = trained()
    held = model.weight.grad.clone()

    def hook(module: nn.Module, keys: Any) -> None:
        raise ZeroDivisionError

    model.register_load_state_dict_post_hook(hook)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        anycard.load(tmp_path / "a.pth", model, dtype=torch.float64)
    assert_same_bits(model.weight.grad, held)


def test_a_mask_of_bytes_into_one_of_bools(tmp_path):
    """Masks were bytes before torch 1.2; plain PyTorch loads them, and so do we. Floats are still refused."""
    model = nn.Module()
    model.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
    torch.save({"mask": torch.tensor([1, 0, 2], dtype=torch.uint8)}, tmp_path / "a.pth")
    plan = anycard.plan(tmp_path / "a.pth", model)
    assert plan.casts == {"mask": ("uint8", "bool")}
    assert anycard.load(tmp_path / "a.pth", model).mask.tolist() == [True, False, True]
    torch.save({"mask": torch.rand(3)}, tmp_path / "b.pth")
    refused(lambda: anycard.load(tmp_path / "b.pth", model), model, "mask")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2, False), nn.Linear(2, 2, False))
    model[1].weight = model[0].weight
    return model


def test_tied_names_with_the_same_values_in_two_dtypes(tmp_path):
    """Two stored tensors of one that the model ties are told apart by what the model makes of them."""
    values = torch.tensor([[0.5, 1], [-2, 3]])
    for first, second in ((values.half(), values), (values, values.double())):
        torch.save({"0.weight": first, "1.weight": second}, tmp_path / "a.pth")
        for target in both(tied):
            loaded = anycard.load(tmp_path / "a.pth", target)
            assert loaded[0].weight is loaded[1].weight
            assert_same_bits(loaded[0].weight.detach(), values)
    torch.save({"0.weight": values.half(), "1.weight": values + 1e-4}, tmp_path / "b.pth")
    model = filled(tied(), 5)
    refused(lambda: anycard.load(tmp_path / "b.pth", model), model, "two different tensors")
    assert_same_bits(anycard.load(tmp_path / "b.pth", tied, dtype=torch.float16)[0].weight, values.half())


def test_complex_tensors_of_a_whole_model_stay_complex(tmp_path):
    """dtype= is for floating-point tensors only, of a model that comes whole as well."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("rotation", torch.tensor([1 + 2j]))
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    loaded = anycard.load(tmp_path / "whole.pt", dtype=torch.float64)
    assert_same_bits(loaded.rotation, torch.tensor([1 + 2j]))
    assert_same_bits(loaded[0].weight.detach(), model[0].weight.detach().double())
