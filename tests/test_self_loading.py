"""Modules that load themselves: whatever they make of the stored tensors counts, and a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import agrees_with_torch, assert_same_bits, both, everything, filled, on_meta, refused, told, weights


class Merging(nn.Module):
    """Old files have q, k and v apart; the module joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(6, 2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        parts = [prefix + name for name in "qkv"]
        if all(part in state for part in parts):
            state[prefix + "qkv"] = torch.cat([state.pop(part) for part in parts])
        super()._load_from_state_dict(state, prefix, *args)


def transforming(change: Any, shape: tuple[int, ...]) -> Any:
    """A module class that changes its stored weight while it loads."""

    class Transforming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))
            self.other = nn.Linear(2, 2)

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            state[prefix + "weight"] = change(state[prefix + "weight"])
            super()._load_from_state_dict(state, prefix, *args)

    return Transforming


def scaled_in_place(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight *= 2
    return weight


def first_row_zeroed(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[0] = 0
    return weight


CHANGES = {
    "cat": (lambda w: torch.cat([w[1:], w[:1]]), (3, 3)),
    "double": (lambda w: w * 2, (3, 3)),
    "t": (lambda w: w.t(), (3, 3)),
    "transpose": (lambda w: w.transpose(0, 1), (3, 3)),
    "flip": (lambda w: w.flip(0), (3, 3)),
    "T": (lambda w: w.T, (3, 3)),
    "mT": (lambda w: w.mT, (3, 3)),
    "rows in another order": (lambda w: w[[2, 0, 1]], (3, 3)),
    "in place": (scaled_in_place, (3, 3)),
    "item set": (first_row_zeroed, (3, 3)),
    "reshape": (lambda w: w.reshape(9, 1), (9, 1)),
    "view": (lambda w: w.view(1, 9), (1, 9)),
    "new axes": (lambda w: w[:, :, None, None], (3, 3, 1, 1)),
    "unsqueeze": (lambda w: w.unsqueeze(-1), (3, 3, 1)),
    "half and back": (lambda w: w.to(torch.float16).float(), (3, 3)),
    "to half": (lambda w: w.to(torch.float16), (3, 3)),
    "clone": (lambda w: w.clone(), (3, 3)),
    "slice": (lambda w: w[:2], (2, 3)),
    "clamp": (lambda w: w.clamp(0.8, 1.2), (3, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_module_makes_of_its_weight_while_loading_counts(tmp_path, change):
    """Whatever a module does to a stored tensor before it takes it, the result is load_state_dict's."""
    kind = transforming(*CHANGES[change])
    state = weights(filled(kind())) | {"weight": torch.rand(3, 3) + 0.5}
    agrees_with_torch(kind, state, tmp_path / "a.pth")


def test_a_module_that_joins_its_old_parts(tmp_path):
    """q, k and v apart in the file become one parameter, inside other modules and beside them."""
    parts = {name: torch.rand(2, 2) for name in "qkv"}
    state = {f"1.{k}": v for k, v in parts.items()} | {"0.weight": torch.rand(2, 2), "0.bias": torch.rand(2)}
    agrees_with_torch(lambda: nn.Sequential(nn.Linear(2, 2), Merging()), state, tmp_path / "parts.pth")
    assert anycard.plan(tmp_path / "parts.pth", nn.Sequential(nn.Linear(2, 2), Merging())).called == ("1",)


def test_a_module_that_forgives_a_missing_name(tmp_path):
    """A module that takes its own name out of the missing ones is believed."""

    class Forgiving(nn.Linear):
        def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
            super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
            missing[:] = [name for name in missing if name != prefix + "bias"]

    agrees_with_torch(lambda: Forgiving(2, 2), {"weight": torch.rand(2, 2)}, tmp_path / "a.pth")


def test_a_module_that_gives_its_own_value_for_a_missing_name(tmp_path):
    """A module that puts its present value where the file has none loads, and keeps that value."""

    class Filling(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            state.setdefault(prefix + "bias", self.bias.detach())
            super()._load_from_state_dict(state, prefix, *args)

    path = tmp_path / "a.pth"
    torch.save({"weight": torch.rand(2, 2)}, path)
    model = filled(Filling(2, 2), 5)
    want = model.bias.detach().clone()
    assert_same_bits(anycard.load(path, model).bias, want)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = anycard.load(path, lambda: Filling(2, 2)).bias
    assert fresh.abs().max() < 1


@pytest.mark.parametrize("inner", [False, True])
def test_a_module_that_throws_away_what_it_no_longer_has(tmp_path, inner):
    """A stored name that the module pops while loading is not unexpected."""

    class Dropping(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            state.pop(prefix + "mask", None)
            super()._load_from_state_dict(state, prefix, *args)

    prefix = "0." if inner else ""
    build = (lambda: nn.Sequential(Dropping(2, 2))) if inner else (lambda: Dropping(2, 2))
    state = {prefix + "weight": torch.rand(2, 2), prefix + "bias": torch.rand(2), prefix + "mask": torch.ones(2)}
    agrees_with_torch(build, state, tmp_path / "a.pth")


def test_what_a_module_computes_after_loading_its_parameters(tmp_path):
    """A cache that `_load_from_state_dict` computes from the loaded parameter is right."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("inverse", torch.ones(3), persistent=False)

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            self.inverse.copy_(1 / self.weight.detach())

    agrees_with_torch(Cached, {"weight": torch.rand(3) + 1}, tmp_path / "a.pth")


@pytest.mark.parametrize("how", ["data", "mul_", "fill_"])
def test_what_a_module_changes_after_loading_its_parameters(tmp_path, how):
    """In-place changes to the loaded parameter after the copy hold, too."""

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("loads", torch.zeros(1))

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            with torch.no_grad():
                if how == "data":
                    self.weight.data[0] = 0
                elif how == "mul_":
                    self.weight.mul_(2)
                else:
                    self.loads.fill_(9)

    agrees_with_torch(After, {"weight": torch.rand(3) + 1, "loads": torch.ones(1)}, tmp_path / "a.pth")


def test_a_module_that_copies_by_itself(tmp_path):
    """`self.weight.data.copy_(state[...])`, the oldest idiom, under another name."""

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
            self.weight.data.copy_(state[prefix + "w"])

    path = tmp_path / "a.pth"
    torch.save({"w": torch.rand(3) + 3}, path)
    want = torch.load(path)["w"]
    for target in both(Copying):
        assert_same_bits(anycard.load(path, target).weight, nn.Parameter(want))


def test_a_buffer_whose_size_is_the_files(tmp_path):
    """A module that takes over a buffer of any length does so here, and its old one is not written past."""

    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("items", torch.zeros(0))

        def _load_from_state_dict(self, state, prefix, *args):
            if prefix + "items" in state:
                self.items = state[prefix + "items"].clone()
            super()._load_from_state_dict(state, prefix, *args)

    state = weights(filled(Queue())) | {"items": torch.rand(7)}
    agrees_with_torch(Queue, state, tmp_path / "a.pth")
    agrees_with_torch(lambda: nn.Sequential(Queue()), {f"0.{k}": v for k, v in state.items()}, tmp_path / "b.pth")


def test_value_dependent_loading(tmp_path):
    """A module that looks at the stored numbers to decide is given real ones."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self.seen = 0

        def _load_from_state_dict(self, state, prefix, *args):
            self.seen = int(state[prefix + "step"])
            if float(state[prefix + "weight"].sum()) < 0:
                state[prefix + "weight"] = -state[prefix + "weight"]
            super()._load_from_state_dict(state, prefix, *args)

    path = tmp_path / "a.pth"
    agrees_with_torch(Picky, {"weight": -torch.rand(3), "step": torch.tensor(12)}, path)
    assert anycard.load(path, Picky).seen == 12


class Refusing(Merging):
    """Loads itself, and fails after it has changed things."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        float(state[prefix + "qkv"].sum())
        raise RuntimeError("no weights for me")


class Replacing(nn.Module):
    """Loads itself by putting a new buffer in the place of the old."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.items = state[prefix + "items"] * 2


def test_a_refusal_of_a_module_that_loads_itself_changes_nothing(tmp_path):
    """A module raises in the middle of its loading: every tensor of the whole model is as it was."""
    state = {f"1.{k}": torch.rand(2, 2) for k in "qkv"} | {"0.weight": torch.rand(2, 2), "0.bias": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.Linear(2, 2), Refusing()), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "no weights for me")


def test_a_later_refusal_puts_back_what_an_earlier_module_replaced(tmp_path):
    """One module replaced its buffer, the next refuses: the first has its old buffer again."""
    state = {f"1.{k}": torch.rand(2, 2) for k in "qkv"} | {"0.items": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(Replacing(), Refusing()), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "no weights for me")


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_not_strict_holds_for_modules_that_load_themselves(tmp_path, what):
    """strict=False loads what fits of a module that computes, and says what it left out."""

    class Computing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.bias = nn.Parameter(torch.zeros(2))

        def _load_from_state_dict(self, state, prefix, *args):
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *args)

    state = {"weight": torch.rand(2)} | (
        {"bias": torch.rand(2), "gamma": torch.rand(2)} if what == "unexpected" else {}
    )
    torch.save(state, tmp_path / "a.pth")
    model = filled(Computing(), 5)
    name = "gamma" if what == "unexpected" else "bias"
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, name)
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), name)
    assert_same_bits(model.weight.detach(), state["weight"] * 2)


def test_only_keeps_its_hands_off_other_modules_that_load_themselves(tmp_path):
    """only= names one part: a self-loading module elsewhere is not called."""
    state = {f"1.{k}": torch.rand(2, 2) for k in "qkv"} | {"0.weight": torch.rand(2, 2), "0.bias": torch.rand(2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.Linear(2, 2), Merging()), 5)
    before = everything(model)
    anycard.load(tmp_path / "a.pth", model, only="0")
    assert_same_bits(model[0].weight.detach(), state["0.weight"])
    assert_same_bits(model[1].qkv.detach(), before["1.qkv"])


def test_a_meta_model_that_loads_itself_keeps_its_ties(tmp_path):
    """Where a module must be called for real, a meta model's ties are still one parameter."""

    class Tied(Merging):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2, bias=False)
            self.two = nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    weight = torch.rand(2, 2)
    state = {k: torch.rand(2, 2) for k in "qkv"} | {"one.weight": weight, "two.weight": weight}
    torch.save(state, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", on_meta(Tied), device="cpu")
    assert model.one.weight is model.two.weight
    assert_same_bits(model.one.weight.detach(), weight)
    assert_same_bits(model.qkv.detach(), torch.cat([state[k] for k in "qkv"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_loader_that_gives_a_tied_tensor_another_dtype(tmp_path, dtype):
    """The tensor is also filled under its other name, after the call: as it is by then."""

    class Head(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            if float(state[f"{prefix}weight"].sum()) > -1:  # a look at values: it is called for real
                self.weight.data = self.weight.data.to(dtype)
            super()._load_from_state_dict(state, prefix, *args)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.head = Head(32, 64, bias=False)
            self.head.weight = self.embedding.weight

    weight = (torch.arange(64 * 32) % 100).reshape(64, 32).float()
    torch.save({"embedding.weight": weight, "head.weight": weight}, tmp_path / "a.pth")
    model = anycard.load(tmp_path / "a.pth", Tied())
    assert_same_bits(model.embedding.weight.detach(), weight.to(dtype))


@pytest.mark.parametrize("how", ["itself", "hooks"])
def test_a_module_that_drops_a_stored_name_keeps_its_own_value(tmp_path, how):
    """It takes a key out and forgives that it is missing: plain PyTorch leaves the buffer alone, whatever its shape."""

    class Dropping(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("grid", torch.zeros(3))
            if how == "hooks":
                self.register_load_state_dict_pre_hook(
                    lambda module, state, prefix, *_: state.pop(prefix + "grid", None)
                )
                self.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            if how == "itself":
                state.pop(prefix + "grid", None)
            super()._load_from_state_dict(state, prefix, *args)
            if how == "itself":
                args[2].remove(prefix + "grid")

    build = lambda: nn.Sequential(nn.ReLU(), Dropping())  # noqa: E731
    for shape in (3, 5):
        agrees_with_torch(build, {**filled(build()).state_dict(), "1.grid": torch.rand(shape)}, tmp_path / "a.pth")
