"""Modules that load themselves are asked on placeholders: nothing of them changes, and no write is missed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import (
    agrees_with_torch,
    assert_same,
    assert_same_bits,
    draws_nothing,
    everything,
    filled,
    quiet,
    told,
    unchanged,
    weights,
)


class Weighted(nn.Module):
    """One weight, whose stored values go through `change` on their way."""

    def __init__(self, change: Any = None, shape: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.change = change

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.change is not None:
            self.change(state, prefix + "weight")
        super()._load_from_state_dict(state, prefix, *args)


def _set_data(state: dict[str, Any], name: str) -> None:
    state[name].data = state[name] * 2


WRITES = {
    "row": lambda s, n: s[n][0].zero_(),
    "row_add": lambda s, n: s[n][0].add_(1),
    "element": lambda s, n: s[n][0].__setitem__(0, 7.0),
    "transposed": lambda s, n: s[n].t().mul_(2),
    "permuted": lambda s, n: s[n].permute(1, 0)[0].fill_(3),
    "diagonal": lambda s, n: s[n].diagonal().zero_(),
    "chunk": lambda s, n: s[n].chunk(2)[1].zero_(),
    "unbind": lambda s, n: [row.zero_() for row in s[n]][:0],
    "flat": lambda s, n: s[n].view(-1)[1:].zero_(),
    "data": lambda s, n: s[n].data[0].zero_(),
    "detached": lambda s, n: s[n].detach().mul_(3),
    "out": lambda s, n: torch.mul(s[n], 2, out=s[n]),
    "foreach": lambda s, n: torch._foreach_mul_([s[n]], 3),
    "set_data": _set_data,
    "in_place": lambda s, n: s[n].__imul__(2),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_to_what_is_stored_counts(tmp_path, how):
    """However a module writes to a tensor before it hands it on: the values are those that plain PyTorch gives."""
    agrees_with_torch(lambda: Weighted(WRITES[how]), {"weight": torch.rand(2, 2)}, tmp_path / "a.pth")


class Metric(nn.Module):
    """Keeps its state as an attribute, as torchmetrics does, and takes it out of the state dict on load."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.tensor(0.0)
        self.seen: list[int] = []

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        destination = OrderedDict() if destination is None else destination
        destination[prefix + "total"] = self.total
        return destination

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.total = state.pop(prefix + "total")
        self.seen.append(1)


class Measured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.metric = nn.Linear(2, 2), Metric()


def test_a_module_that_keeps_its_state_as_an_attribute(tmp_path):
    """The loaded value is the file's, and a plan or a refused load leaves the live one alone."""
    source = filled(Measured())
    source.metric.total = torch.tensor(8.0)
    torch.save({**source.state_dict()}, tmp_path / "a.pth")
    for model in (Measured(), Measured):
        assert_same_bits(anycard.load(tmp_path / "a.pth", model).metric.total, torch.tensor(8.0))
    torch.save({**source.state_dict(), "spare": torch.ones(1)}, tmp_path / "b.pth")
    model = filled(Measured(), 5)
    value = model.metric.total
    with unchanged(model):
        anycard.plan(tmp_path / "a.pth", model)
        with pytest.raises(anycard.MismatchError):
            anycard.load(tmp_path / "b.pth", model)
    assert model.metric.total is value and model.metric.seen == []


class Growing(nn.Module):
    """Builds its stem anew for old files, as torchvision's mnasnet does."""

    _version = 2

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(2, width)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            self.stem = nn.Linear(2, 3)
            self._version = 1
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_a_module_that_builds_others_on_load(tmp_path):
    """A plan and a refused load leave the very modules, the version and the random state; a load does as PyTorch."""
    source = Growing()
    source.stem, source._version = nn.Linear(2, 3), 1
    torch.save(filled(source).state_dict(), tmp_path / "a.pth")
    model = filled(Growing(), 5)
    stem = model.stem
    with unchanged(model), draws_nothing():
        anycard.plan(tmp_path / "a.pth", model)
    assert model.stem is stem and model._version == 2
    bad = filled(Growing(7), 5)
    stem = bad.stem
    with unchanged(bad), pytest.raises(anycard.MismatchError):
        anycard.load(tmp_path / "a.pth", bad)
    assert bad.stem is stem and bad._version == 2
    assert_same(weights(anycard.load(tmp_path / "a.pth", model)), weights(source))


class Scaled(nn.Linear):
    """Its extra state is a tensor, as fp8 layers have it."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = torch.zeros(2)

    def get_extra_state(self) -> torch.Tensor:
        return self.scale

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scale = state


def test_a_tensor_as_extra_state_is_no_part_of_the_trace(tmp_path):
    """A plan leaves it alone; a load gives the file's values; under wrappers too, and only= holds for it."""
    source = filled(nn.Sequential(Scaled(), Scaled()))
    source[0].scale, source[1].scale = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = filled(nn.Sequential(Scaled(), Scaled()), 5)
    anycard.plan(tmp_path / "a.pth", model)
    assert_same_bits(model[0].scale, torch.zeros(2))
    anycard.load(tmp_path / "a.pth", model, only="0")
    assert_same_bits(model[0].scale, source[0].scale)
    assert_same_bits(model[1].scale, torch.zeros(2))
    anycard.load(tmp_path / "a.pth", nn.DataParallel(model))
    assert_same_bits(model[1].scale, source[1].scale)


class Doubling(nn.Linear):
    """Computes on load, and has extra state."""

    extra = "old"

    def get_extra_state(self) -> Any:
        return {"v": 5}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m)])
def test_extra_state_of_a_called_module_under_wrappers(tmp_path, wrap):
    """It is given under the name that the module has in its tree."""
    source = filled(nn.Sequential(Doubling(2, 2)))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = filled(nn.Sequential(Doubling(2, 2)), 5)
    anycard.load(tmp_path / "a.pth", wrap(model))
    assert model[0].extra == {"v": 5}
    assert_same_bits(model[0].weight, source[0].weight * 2)


class Positions(nn.Module):
    """Computes on load, and has a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("positions", torch.arange(3.0), persistent=False)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, *args)


def test_a_meta_model_whose_called_module_leaves_tensors_without_a_value(tmp_path):
    """What nothing gives a value is named, and stays on the meta device; never memory that nobody wrote."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    with torch.device("meta"):
        model = Positions()
    with pytest.raises(anycard.MismatchError, match="no value for positions"):
        anycard.load(tmp_path / "a.pth", model)
    assert model.weight.is_meta and model.positions.is_meta
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "positions")
    assert model.positions.is_meta
    assert_same_bits(model.weight.detach(), torch.full((3,), 2.0))


def test_a_lazy_layer_on_the_meta_device(tmp_path):
    """It takes its size and its memory from the file."""
    source = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    torch.save(filled(source).state_dict(), tmp_path / "a.pth")
    with torch.device("meta"):
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    anycard.load(tmp_path / "a.pth", model)
    assert_same(weights(model), weights(source))
    model(torch.rand(1, 4))


def test_ties_between_a_called_module_and_another_on_the_meta_device(tmp_path):
    """They are one parameter after the load."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Linear(2, 2, bias=False), Doubling(2, 2, bias=False)
            self.head.weight = self.embedding.weight

    torch.save(filled(Tied()).state_dict(), tmp_path / "a.pth")
    with torch.device("meta"):
        model = Tied()
    anycard.load(tmp_path / "a.pth", model)
    assert model.head.weight is model.embedding.weight and not model.head.weight.is_meta


def _count(module: nn.Module, keys: Any) -> None:
    module.calls = getattr(module, "calls", 0) + 1


@pytest.mark.parametrize("own", [True, False])
def test_post_hooks_run_once_children_first(tmp_path, own):
    """As in plain PyTorch, also below a model with its own load_state_dict, and there where names are missing too."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state, strict, assign)

    if not own:
        del Outer.load_state_dict
    order: list[str] = []
    torch.save(filled(Outer()).state_dict(), tmp_path / "a.pth")
    torch.save({"inner.weight": torch.ones(2, 2), "inner.bias": torch.ones(2)}, tmp_path / "b.pth")
    for name, strict in (("a.pth", True), ("b.pth", False))[: 1 + own]:
        model = filled(Outer(), 5)
        for label, module in (("outer", model), ("inner", model.inner)):
            module.register_load_state_dict_post_hook(lambda m, keys, label=label: order.append(label))
        order.clear()
        with quiet() if strict else pytest.warns(UserWarning, match=r"other\.weight"):
            anycard.load(tmp_path / name, model, strict=strict)
        assert order == ["inner", "outer"]


def test_hooks_that_someone_gave_a_wrapper(tmp_path):
    """They are asked too: a renaming one works, and a post-hook is called."""
    torch.save({"module.old": torch.ones(2, 2), "module.bias": torch.ones(2)}, tmp_path / "a.pth")
    model = nn.DataParallel(filled(nn.Linear(2, 2), 5))

    def rename(state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if "module.old" in state:
            state["module.weight"] = state.pop("module.old")

    model._register_load_state_dict_pre_hook(rename)
    model.register_load_state_dict_post_hook(_count)
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.module.weight.detach(), torch.ones(2, 2))
    assert model.calls == 1


def test_not_strict_through_a_models_own_entry_says_what_was_left_out(tmp_path):
    """Its load_state_dict tells what is missing and unexpected: a warning names it, and the plan notes it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Linear(2, 2), nn.Linear(2, 2)

        def load_state_dict(self, state: Any, strict: bool = True) -> Any:
            return super().load_state_dict(state, strict)

    torch.save({"c.weight": torch.ones(2, 2), "c.bias": torch.ones(2), "zzz": torch.ones(1)}, tmp_path / "a.pth")
    told(lambda: anycard.load(tmp_path / "a.pth", Own(), strict=False), "d.weight", "zzz")
    assert "d.weight" in str(anycard.plan(tmp_path / "a.pth", Own()))
    model = filled(Own(), 5)
    with unchanged(model), pytest.raises(anycard.MismatchError):
        anycard.load(tmp_path / "a.pth", model)


def test_attributes_come_back_after_a_refused_load(tmp_path):
    """A module sets attributes and its tensors' values before a later one refuses."""

    class Setting(Doubling):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            self.scale = float(state[prefix + "weight"].sum())
            self.marks.append(1)
            self.mean.add_(1)
            super()._load_from_state_dict(state, prefix, *args)

        def __init__(self) -> None:
            super().__init__(2, 2)
            self.scale, self.marks, self.mean = 0.5, [], torch.zeros(1)

    class Refusing(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            raise KeyError(f"never {float(state[prefix + 'weight'].sum()):.0f}")

    model = filled(nn.Sequential(Setting(), Refusing(2, 2)), 5)
    torch.save(filled(copy.deepcopy(model)).state_dict(), tmp_path / "a.pth")
    before = everything(model)
    with pytest.raises(anycard.MismatchError, match="refused"):
        anycard.load(tmp_path / "a.pth", model)
    assert_same(everything(model), before)
    assert (model[0].scale, model[0].marks, float(model[0].mean)) == (0.5, [], 0.0)


def test_only_holds_for_a_module_that_is_called(tmp_path):
    """What only= leaves out keeps its values, whatever the module's own loading does to it; and may be missing."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.fc = nn.Linear(2, 2), nn.Linear(2, 2)

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict({name: value * 2 for name, value in state.items()}, strict)

    class Computing(Own):
        load_state_dict = nn.Module.load_state_dict

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            state[prefix + "fc.weight"] = state[prefix + "fc.weight"] * 2
            super()._load_from_state_dict(state, prefix, *args)

    for kind in (Own, Computing):
        source = filled(kind())
        torch.save(source.state_dict(), tmp_path / "a.pth")
        torch.save({"fc.weight": source.fc.weight, "fc.bias": source.fc.bias}, tmp_path / "b.pth")
        for name in ("a.pth", "b.pth"):
            model = filled(kind(), 5)
            before = everything(model)
            parameter = model.backbone.weight
            assert "gets its values back" in str(anycard.plan(tmp_path / name, model, only="fc"))
            anycard.load(tmp_path / name, model, only="fc")
            assert_same_bits(model.fc.weight, source.fc.weight * 2)
            assert_same_bits(model.backbone.weight, before["backbone.weight"])
            assert_same_bits(model.backbone.bias, before["backbone.bias"])
            assert model.backbone.weight is parameter
