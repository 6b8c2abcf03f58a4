"""What the tests share: values no initialisation would give, comparison bit for bit, device tags, small models."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def bits(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order as bytes: NaN and -0.0 are told apart.

    The lazy conjugate and negative bits are resolved by signs, since torch's arithmetic changes signalling NaNs.
    """
    plain = tensor.detach().cpu()
    conj, neg = plain.is_conj(), plain.is_neg()
    plain = plain.conj() if conj else plain
    plain = torch._neg_view(plain) if neg else plain
    flat = torch.empty(plain.numel(), dtype=plain.dtype)
    flat.view(plain.shape).copy_(plain)
    data = flat.view(torch.uint8).numpy()
    part = flat.element_size() // (2 if flat.is_complex() else 1)
    if conj:
        data[2 * part - 1 :: 2 * part] ^= 0x80
    if neg:
        data[part - 1 :: part] ^= 0x80
    return data.tobytes()


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, name: str = "") -> None:
    """Same dtype, shape and bits."""
    assert got.dtype == want.dtype, f"{name}: {got.dtype} instead of {want.dtype}"
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    assert bits(got) == bits(want), f"{name}: other values"


def assert_same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """Same names, in any order, and the same tensors bit for bit."""
    assert set(got) == set(want), f"names differ: {sorted(set(got) ^ set(want), key=str)}"
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor, name)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer values that no initialisation would give; ties stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5 + seed)
            elif not tensor.is_complex() and tensor.dtype != torch.bool:
                tensor.copy_(torch.randint(3, 90, tensor.shape, generator=generator) + seed)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the tensors in the model's own state dict."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers, non-persistent ones too."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in named}


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The block leaves every parameter and buffer of the model the same object with the same bits."""
    held = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    before = everything(model)
    yield
    after = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    assert {n: id(t) for n, t in held.items()} == {n: id(t) for n, t in after.items()}
    assert_same(everything(model), before)


@contextlib.contextmanager
def draws_nothing() -> Iterator[None]:
    """The block leaves the global random state as it was."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state advanced"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings do not count within this block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def tagged(tag: str) -> Iterator[None]:
    """Within this block torch.save writes this device tag on every storage, as on a machine that has it."""
    kept = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: tag
    try:
        yield
    finally:
        torch.serialization.location_tag = kept


def told(call: Callable[[], Any], *words: str) -> Any:
    """The call refuses or warns, and says these words; gives its value, or None."""
    import anycard

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = call()
        except anycard.CheckpointError as error:
            text, value = str(error), None
        else:
            text = " ".join(str(w.message) for w in caught)
            assert text, f"went through without a word about {words}"
    missing = [word for word in words if word not in text]
    assert not missing, f"does not mention {missing}: {text[:400]}"
    return value


def refused(call: Callable[[], Any], model: nn.Module, *words: str) -> Any:
    """The call is a MismatchError that says these words and leaves the model as it was."""
    import anycard

    with unchanged(model), pytest.raises(anycard.MismatchError) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"does not mention {missing}: {caught.value}"
    return caught.value


def only_file(folder: Path) -> str:
    """The name of the one file in a folder."""
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 1, names
    return names[0]


class Small(nn.Module):
    """Weights, float and integer buffers."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)


class Language(nn.Module):
    """Three names for one tensor: embedding, head, and the head of a second model."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.aux = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False)})
        if tied:
            self.lm_head.weight = self.aux["head"].weight = self.wte.weight

    def is_tied(self) -> bool:
        return self.lm_head.weight is self.wte.weight is self.aux["head"].weight


def both(build: Any) -> list[Any]:
    """The two ways to give a model: a factory, and one that is there."""
    return [build, filled(build(), 5)]


def agrees_with_torch(build: Any, state: dict[str, Any], path: Any) -> None:
    """anycard gives a module that loads itself the very tensors that load_state_dict gives it."""
    import anycard

    torch.save(state, path)
    theirs = filled(build(), 5)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    for target in both(lambda: filled(build(), 5)):
        assert_same(everything(anycard.load(path, target)), everything(theirs))


def on_meta(build: Any) -> nn.Module:
    """The model without memory."""
    with torch.device("meta"):
        return build()


class Reduced:
    """Pickles as the call, with the state, that an older torch wrote."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def old_tensor(view: torch.Tensor, kind: Any = torch.FloatTensor) -> Reduced:
    """As torch below 0.2: the class called, and a state."""
    return Reduced(kind, (), (view.storage(), view.storage_offset(), tuple(view.shape), view.stride()))
