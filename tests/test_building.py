"""How a model is built without being initialised."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import init

import anycard
from helpers import assert_same, assert_same_bits, bits, draws_nothing, everything, filled, quiet, unchanged, weights


class Computing(nn.Module):
    """Computes on its parameters in __init__, in the ways that people do; and keeps buffers that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        init.kaiming_uniform_(self.weight)
        self.twin = nn.Parameter(self.weight.detach().clone())
        self.square = nn.Parameter(torch.empty(4, 4))
        init.orthogonal_(self.square)
        self.register_buffer("scale", self.weight.detach().std(), persistent=False)
        self.register_buffer("table", torch.arange(6.0).view(2, 3).cumsum(1), persistent=False)
        self.register_buffer("ones", torch.full((3,), 1.5), persistent=False)
        self.embedding = nn.Embedding(5, 3, padding_idx=2)
        self.norm = nn.LayerNorm(3)
        with torch.no_grad():
            self.norm.weight.mul_(2).add_(1)
            self.norm.bias[1:] = 4


DERIVED = ("table", "ones")


def test_what_init_computes_on_its_parameters_comes_out_right(tmp_path):
    """A factory's non-persistent buffers hold what __init__ computed, the rest what the file holds."""
    source = filled(Computing())
    anycard.save(source, tmp_path / "a.pth")
    fresh = everything(Computing())
    loaded = anycard.load(tmp_path / "a.pth", Computing)
    assert_same(weights(loaded), weights(source))
    for name in DERIVED:
        assert_same_bits(getattr(loaded, name), fresh[name], name)
    assert 0.1 < float(loaded.scale) < 2


def test_what_the_file_lacks_is_initialised(tmp_path):
    """strict=False: every kind of initialisation is carried out for what the file does not hold."""
    torch.save({"norm.bias": torch.zeros(3)}, tmp_path / "a.pth")
    with quiet():
        loaded = anycard.load(tmp_path / "a.pth", Computing, strict=False)
    assert_same_bits(loaded.norm.weight.detach(), torch.full((3,), 3.0))
    assert_same_bits(loaded.embedding.weight[2].detach(), torch.zeros(3))
    assert loaded.embedding.weight[0].abs().min() > 0
    assert torch.allclose(loaded.square @ loaded.square.t(), torch.eye(4), atol=1e-5)
    assert_same_bits(loaded.twin.detach(), loaded.weight.detach())
    assert 0 < loaded.weight.abs().max() <= 3


INITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "uniform": lambda w: init.uniform_(w, 2, 3),
    "normal": lambda w: init.normal_(w, 100, 1),
    "trunc normal": lambda w: init.trunc_normal_(w, 5, 1, 4, 6),
    "constant": lambda w: init.constant_(w, 7),
    "ones": init.ones_,
    "eye": init.eye_,
    "dirac": lambda w: init.dirac_(w.unsqueeze(-1)),
    "xavier": init.xavier_uniform_,
    "kaiming": lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "orthogonal": init.orthogonal_,
    "method": lambda w: w.data.uniform_(2, 3),
    "chain": lambda w: w.data.normal_().mul_(0.01).clamp_(-0.02, 0.02).add_(5),
    "slices": lambda w: (w.data[:2].fill_(1), w.data[2:].uniform_(5, 6), w.data[0, 0].zero_()),
    "copy": lambda w: w.data.copy_(torch.arange(16.0).view(4, 4)),
    "assign": lambda w: w.data.__setitem__(slice(None), 3.5),
    "plus": lambda w: w.data.fill_(2).__iadd__(1),
    "exponential": lambda w: w.data.exponential_().log_(),
    "bernoulli": lambda w: w.data.bernoulli_(0.5),
    "out": lambda w: torch.arange(16.0, out=w.data.view(-1)),
    "masked": lambda w: w.data.zero_().masked_fill_(torch.eye(4) > 0, 9.0),
    "numpy": lambda w: w.data.zero_().numpy().__iadd__(4.0),
}


@pytest.mark.parametrize("kind", INITS)
def test_every_way_to_initialise_is_made_up_for(tmp_path, kind):
    """With one seed, what the file lacks comes out as plain torch initialises it, whatever way that is."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))
            INITS[kind](self.weight)
            self.rest = nn.Parameter(torch.zeros(2))

    torch.save({"rest": torch.ones(2)}, tmp_path / "a.pth")
    torch.manual_seed(11)
    want = Model()
    torch.manual_seed(11)
    with quiet():
        loaded = anycard.load(tmp_path / "a.pth", Model, strict=False)
    assert_same_bits(loaded.weight.detach(), want.weight.detach())
    assert_same_bits(loaded.rest.detach(), torch.ones(2))


RANDOM_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "transposed conv": lambda: nn.ConvTranspose1d(2, 3, 2),
    "embedding": lambda: nn.Embedding(4, 3, padding_idx=1),
    "lstm": lambda: nn.LSTM(3, 4),
    "gru cell": lambda: nn.GRUCell(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "bilinear": lambda: nn.Bilinear(2, 2, 2),
    "trunc normal": lambda: _initialised(lambda w: init.trunc_normal_(w, std=0.02)),
    "xavier": lambda: _initialised(init.xavier_normal_),
    "own uniform": lambda: _initialised(lambda w: w.data.uniform_(-1, 1)),
    "randn times": lambda: _initialised(lambda w: w.data.normal_().mul_(0.1)),
}


def _initialised(how: Callable[[torch.Tensor], Any]) -> nn.Module:
    layer = nn.LayerNorm((4, 4))
    how(layer.weight)
    return layer


@pytest.mark.parametrize(
    "kind",
    RANDOM_LAYERS,
)
def test_a_factory_whose_initialisation_is_skipped_draws_nothing(tmp_path, kind):
    """Random initialisation that the file overwrites is not carried out: the global generator stands still."""
    source = filled(RANDOM_LAYERS[kind]())
    anycard.save(source, tmp_path / "a.pth")
    torch.manual_seed(0)
    with draws_nothing():
        loaded = anycard.load(tmp_path / "a.pth", RANDOM_LAYERS[kind])
    assert_same(weights(loaded), weights(source))


def test_two_loads_get_two_different_heads(tmp_path):
    """What the file lacks is drawn from the caller's generator, which advances; one seed gives one head."""

    def build() -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})

    anycard.save({f"body.{k}": v for k, v in nn.Linear(3, 3).state_dict().items()}, tmp_path / "a.pth")
    heads = []
    for seed in (5, None, 5):
        if seed is not None:
            torch.manual_seed(seed)
        with quiet():
            heads.append(bits(anycard.load(tmp_path / "a.pth", build, strict=False)["head"].weight))
    assert heads[0] != heads[1]
    assert heads[0] == heads[2]


def test_a_generator_of_the_models_own_gives_what_it_always_gives(tmp_path):
    """A fixed projection drawn from the model's own seeded generator does not change because weights were skipped."""

    class Projecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(42)
            self.weight = nn.Parameter(torch.empty(3, 3))
            init.normal_(self.weight, generator=generator)
            self.register_buffer("projection", torch.randn(3, 3, generator=generator), persistent=False)

    source = Projecting()
    anycard.save(source, tmp_path / "a.pth")
    assert_same(everything(anycard.load(tmp_path / "a.pth", Projecting)), everything(source))


def test_a_model_that_another_thread_builds_meanwhile_is_initialised(tmp_path):
    """Skipping is this thread's affair: a model that another thread builds during a load has its values."""
    anycard.save(filled(nn.Linear(8, 8)), tmp_path / "a.pth")
    others: list[nn.Module] = []

    def factory() -> nn.Module:
        def build() -> None:
            others.append(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Embedding(9, 4)))

        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        return nn.Linear(8, 8)

    loaded = anycard.load(tmp_path / "a.pth", factory)
    assert_same(weights(loaded), weights(filled(nn.Linear(8, 8))))
    (other,) = others
    assert 0 < other[0].weight.abs().max() <= 8**-0.5 + 1e-6
    assert_same_bits(other[1].weight.detach(), torch.ones(8))
    assert other[2].weight.std() > 0.3


@pytest.mark.parametrize("only", ["1.*", None])
def test_what_another_thread_writes_into_the_model_stays(tmp_path, only):
    """A thread that the factory starts loads a layer whose own values were put off: the draw does not come after it."""
    source = filled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    torch.save({f"1.{k}": v for k, v in source[1].state_dict().items()}, tmp_path / "a.pth")

    def factory() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        thread = threading.Thread(target=model[0].load_state_dict, args=(source[0].state_dict(),))
        thread.start()
        thread.join()
        if only is None:
            init.normal_(model[0].bias)  # a later draw of the factory's own counts
        return model

    with quiet(), draws_nothing() if only else contextlib.nullcontext():
        loaded = anycard.load(tmp_path / "a.pth", factory, only=only, strict=False)
    got, want = weights(loaded), weights(source)
    if only is None:
        assert bits(got["0.bias"]) != bits(want["0.bias"])
        got["0.bias"] = want["0.bias"]
    assert_same(got, want)


def test_a_factory_in_inference_mode_is_initialised(tmp_path):
    """What the file lacks is drawn for a model of inference tensors as for any other."""

    def build() -> nn.Module:
        with torch.inference_mode():
            return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    source = filled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    anycard.save(source, tmp_path / "a.pth")
    torch.manual_seed(0)
    want = weights(build()[0])
    torch.manual_seed(0)
    loaded = anycard.load(tmp_path / "a.pth", build, only="1")
    assert loaded[0].weight.is_inference()
    assert_same(weights(loaded[0]), want)
    assert_same(weights(loaded[1]), weights(source[1]))


def test_layers_that_the_factory_threw_away_draw_nothing(tmp_path):
    """A head that the factory put another in the place of is not initialised after all."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 10))
        model[1] = nn.Linear(4, 2)
        return model

    source = filled(build())
    anycard.save(source, tmp_path / "a.pth")
    with draws_nothing():
        loaded = anycard.load(tmp_path / "a.pth", build)
    assert_same(weights(loaded), weights(source))


def test_initialisation_works_again_after_a_load(tmp_path):
    """After a load, also one that failed, a model is initialised as ever."""
    anycard.save(filled(nn.Linear(8, 8)), tmp_path / "a.pth")

    def broken() -> nn.Module:
        nn.Linear(2, 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        anycard.load(tmp_path / "a.pth", broken)
    with pytest.raises(anycard.MismatchError):
        anycard.load(tmp_path / "a.pth", lambda: nn.Linear(3, 3))
    torch.manual_seed(1)
    one = nn.Linear(3, 3)
    torch.manual_seed(1)
    two = nn.Linear(3, 3)
    assert_same(weights(one), weights(two))
    assert 0 < one.weight.abs().max() < 1


def test_a_factory_that_copies_its_layers(tmp_path):
    """Layers cloned by deepcopy, as TransformerEncoder's are, are equal where the file lacks them."""

    def build() -> nn.Module:
        inner = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        return nn.ModuleDict({"enc": nn.TransformerEncoder(inner, 2), "out": nn.Linear(8, 1)})

    source = filled(build())
    anycard.save(source, tmp_path / "a.pth")
    assert_same(weights(anycard.load(tmp_path / "a.pth", build)), weights(source))
    torch.save({f"out.{k}": v for k, v in source["out"].state_dict().items()}, tmp_path / "out.pth")
    with quiet():
        loaded = anycard.load(tmp_path / "out.pth", build, strict=False)
    one, two = (weights(inner) for inner in loaded["enc"].layers)
    assert_same(one, two)
    assert one["linear1.weight"].abs().max() > 0


def test_a_factory_that_casts_and_moves_its_model(tmp_path):
    """`.half()`, `.to(...)` and `.double()` within the factory are kept."""
    source = filled(nn.Linear(3, 3))
    anycard.save(source, tmp_path / "a.pth")
    for cast, dtype in ((nn.Module.half, torch.float16), (nn.Module.double, torch.float64)):
        loaded = anycard.load(tmp_path / "a.pth", lambda cast=cast: cast(nn.Linear(3, 3)))
        assert_same_bits(loaded.weight.detach(), source.weight.detach().to(dtype))


def test_a_factory_that_gives_an_existing_model(tmp_path):
    """A callable that hands out a model which is there already: it is filled, in place."""
    source, model = filled(nn.Linear(3, 3)), filled(nn.Linear(3, 3), 5)
    anycard.save(source, tmp_path / "a.pth")
    assert anycard.load(tmp_path / "a.pth", lambda: model) is model
    assert_same(weights(model), weights(source))


def test_a_factory_that_gives_no_module(tmp_path):
    """Anything but a module is a TypeError that says what it was."""
    anycard.save(filled(nn.Linear(3, 3)), tmp_path / "a.pth")
    with pytest.raises(TypeError, match="dict"):
        anycard.load(tmp_path / "a.pth", dict)


def test_a_plan_of_a_factory_draws_and_changes_nothing(tmp_path):
    """plan with a factory, or with a model, touches neither random state nor weights."""
    anycard.save(filled(nn.Linear(3, 3)), tmp_path / "a.pth")
    torch.manual_seed(0)
    with draws_nothing():
        assert anycard.plan(tmp_path / "a.pth", lambda: nn.Linear(3, 3)).fits
    model = filled(nn.Linear(3, 3), 5)
    with unchanged(model):
        assert not anycard.plan(tmp_path / "a.pth", nn.Linear(3, 4)).fits
        assert anycard.plan(tmp_path / "a.pth", model).fits
