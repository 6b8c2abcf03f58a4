"""Models that nobody here wrote, and how a model is built without being initialised."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import init

import anycard
from helpers import (
    assert_same,
    assert_same_bits,
    bits,
    draws_nothing,
    everything,
    filled,
    quiet,
    refused,
    unchanged,
    weights,
)

with quiet():
    import timm
    import torchvision.models as vision


ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: vision.resnet18(num_classes=7),
    "mobilenet_v3_small": vision.mobilenet_v3_small,
    "mnasnet0_5": vision.mnasnet0_5,
    "squeezenet1_1": vision.squeezenet1_1,
    "convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=5),
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5),
    "efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0", num_classes=5),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Any]]:
    """A seeded model of the zoo and the folder for its files; built once."""
    held: dict[str, tuple[nn.Module, Any]] = {}

    def get(name: str) -> tuple[nn.Module, Any]:
        if name not in held:
            held.clear()
            held[name] = filled(ZOO[name]()), tmp_path_factory.mktemp(name)
        return held[name]

    return get


@pytest.fixture(scope="module")
def resnet152(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real one, 60 million parameters: the model and its file."""
    torch.manual_seed(152)
    model = vision.resnet152()
    path = tmp_path_factory.mktemp("resnet152") / "resnet152.pth"
    anycard.save(model, path)
    yield model, path
    path.unlink()


def same_tensors(one: nn.Module, two: nn.Module) -> None:
    """Equal names and values, without copies: for a large model without NaN or -0.0."""
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def test_resnet152_goes_out_and_comes_back(resnet152):
    """The main job's model: a factory, an existing model and plain torch get its 932 tensors bit for bit."""
    model, path = resnet152
    same_tensors(anycard.load(path, vision.resnet152), model)
    theirs = torch.load(path, weights_only=True, mmap=True)
    assert list(theirs) == list(model.state_dict())
    assert len(theirs) == 932
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    del theirs
    gc.collect()


def test_building_resnet152_draws_nothing(resnet152):
    """Of its 60 million random numbers none is drawn."""
    with draws_nothing():
        anycard.load(resnet152[1], vision.resnet152)


def test_resnet152_into_data_parallel(resnet152):
    """An existing wrapped resnet152 is filled in place, and nothing is drawn."""
    model, path = resnet152
    with torch.device("meta"):
        other = vision.resnet152()
    other = nn.DataParallel(other.to_empty(device="cpu"))
    with draws_nothing():
        anycard.load(path, other)
    same_tensors(other.module, model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ZOO)
def test_weights_of_models_from_elsewhere(zoo, name, suffix):
    """Weights as torch zip and safetensors, by factory, into an existing model, and read by plain tools."""
    model, folder = zoo(name)
    want = weights(model)
    path = folder / f"weights{suffix}"
    anycard.save(model, path)
    theirs = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert_same(theirs, want)
    assert_same(weights(anycard.load(path, ZOO[name])), want)
    assert_same(weights(anycard.load(path, nn.DataParallel(ZOO[name]())).module), want)
    if suffix == ".pth":
        assert ZOO[name]().load_state_dict(theirs)


OF_A_VERSION = pytest.param("mnasnet0_5")


@pytest.mark.parametrize("name", [OF_A_VERSION if name == "mnasnet0_5" else name for name in ZOO])
def test_whole_models_from_elsewhere(zoo, name):
    """Structure and weights: plain torch and allow= rebuild the model; its weights need no trust."""
    model, folder = zoo(name)
    path = folder / "whole.pt"
    anycard.save(nn.DataParallel(model), path, whole=True)
    theirs = torch.load(path, weights_only=False)
    assert type(theirs) is type(model)
    assert_same(weights(theirs), weights(model))
    with pytest.raises(anycard.UntrustedError, match=r"torchvision|timm") as caught:
        anycard.load(path)
    with quiet():
        rebuilt = anycard.load(path, allow=list(caught.value.needed))
    assert type(rebuilt) is type(model)
    assert_same(everything(rebuilt), everything(model))
    assert str(rebuilt) == str(model)
    assert_same(weights(anycard.load(path, ZOO[name])), weights(model))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_atto"])
def test_a_rebuilt_model_computes_the_same(zoo, name):
    """Rebuilt without running __init__, the model's forward gives the same bits."""
    model, folder = zoo(name)
    model = ZOO[name]().eval()
    anycard.save(model, folder / "run.pt", whole=True)
    with pytest.raises(anycard.UntrustedError) as caught:
        anycard.load(folder / "run.pt")
    rebuilt = anycard.load(folder / "run.pt", allow=list(caught.value.needed))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_bits(rebuilt(image), model(image))


def test_strict_and_not_strict_on_a_model_from_elsewhere(zoo):
    """Another number of classes: refused by name; strict=False loads all but the classifier."""
    model, folder = zoo("resnet18")
    anycard.save(model, folder / "seven.pth")
    other = filled(vision.resnet18(num_classes=9), 3)
    before = weights(other)
    refused(lambda: anycard.load(folder / "seven.pth", other), other, "fc.weight", "7 x 512", "9 x 512")
    with pytest.warns(UserWarning, match=r"fc\.weight"):
        anycard.load(folder / "seven.pth", other, strict=False)
    fc = {k: v for k, v in before.items() if k.startswith("fc.")}
    assert_same(weights(other), weights(model) | fc)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_old_version_stays_old(zoo, suffix):
    """mnasnet keeps its module version in the file; without it torchvision would rebuild its stem."""
    model, folder = zoo("mnasnet0_5")
    path = folder / f"versions{suffix}"
    anycard.save(model, path)
    anycard.convert(path, folder / "turned.safetensors")
    anycard.convert(folder / "turned.safetensors", folder / "back.pth")
    for name in (path, folder / "turned.safetensors", folder / "back.pth"):
        assert_same(weights(anycard.load(name, vision.mnasnet0_5)), weights(model))
    vision.mnasnet0_5().load_state_dict(torch.load(folder / "back.pth", weights_only=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_in_half_precision(tmp_path, dtype, suffix):
    """A bf16 model keeps its dtype and bits in a bf16 target, and is cast by a float32 one, counters excepted."""
    model = filled(vision.resnet18()).to(dtype)
    path = tmp_path / f"half{suffix}"
    anycard.save(model, path)
    assert_same(weights(anycard.load(path, lambda: vision.resnet18().to(dtype))), weights(model))
    assert_same(weights(anycard.load(path, vision.resnet18, dtype="auto")), weights(model))
    floats = {k: v.float() if v.is_floating_point() else v for k, v in weights(model).items()}
    assert_same(weights(anycard.load(path, vision.resnet18)), floats)
    assert_same(weights(anycard.load(path, vision.resnet18, dtype=dtype)), weights(model))
    again = anycard.load(path, vision.resnet18(), dtype=str(dtype))
    assert_same(weights(again), weights(model))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_channels_last_model(tmp_path, suffix):
    """A channels-last model's values are saved; each model that is filled keeps its own memory format."""
    model = filled(vision.resnet18()).to(memory_format=torch.channels_last)
    path = tmp_path / f"last{suffix}"
    anycard.save(model, path)
    theirs = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert_same(theirs, weights(model))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        other = anycard.load(path, vision.resnet18().to(memory_format=memory_format))
        assert_same(weights(other), weights(model))
        assert other.layer1[0].conv1.weight.is_contiguous(memory_format=memory_format)
    built = anycard.load(path, lambda: vision.resnet18().to(memory_format=torch.channels_last))
    assert built.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


# -- built without initialising ------------------------------------------------------------------


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


@pytest.mark.parametrize("strict", [True, False])
def test_a_load_into_an_existing_model_draws_nothing(zoo, strict):
    """The random state after is the one before."""
    model, folder = zoo("resnet18")
    anycard.save(model, folder / "a.pth")
    other = vision.resnet18(num_classes=7 if strict else 4)
    with draws_nothing(), quiet():
        anycard.load(folder / "a.pth", other, strict=strict)


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


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.emb.weight
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.02)


def test_a_language_model_with_tied_weights(tmp_path):
    """GPT's tie of head and embedding is one tensor in the file, and one after every way to load."""

    source = filled(Language())
    anycard.save(source, tmp_path / "a.pth")
    size = sum(p.numel() * 4 for p in source.parameters())
    assert (tmp_path / "a.pth").stat().st_size < size + 20_000
    anycard.save(source, tmp_path / "a.safetensors")
    anycard.save(source, tmp_path / "whole.pt", whole=True)
    with torch.device("meta"):
        meta = Language()
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path / "whole.pt"):
        for target in (Language, Language(), nn.DataParallel(Language())):
            loaded = anycard.load(path, target)
            loaded = getattr(loaded, "module", loaded)
            assert loaded.head.weight is loaded.emb.weight
            assert_same(weights(loaded), weights(source))
    assert anycard.load(tmp_path / "a.pth", meta).head.weight is meta.emb.weight
    assert_same(weights(meta), weights(source))
