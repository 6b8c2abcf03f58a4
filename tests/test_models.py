"""Models that nobody here wrote."""

from __future__ import annotations

import gc
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
    draws_nothing,
    everything,
    filled,
    quiet,
    refused,
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


@pytest.mark.parametrize("strict", [True, False])
def test_a_load_into_an_existing_model_draws_nothing(zoo, strict):
    """The random state after is the one before."""
    model, folder = zoo("resnet18")
    anycard.save(model, folder / "a.pth")
    other = vision.resnet18(num_classes=7 if strict else 4)
    with draws_nothing(), quiet():
        anycard.load(folder / "a.pth", other, strict=strict)


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
