"""Models that cannot simply be written, or are odd to save: layouts, subclasses, modes, defaults of the caller's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import anycard
from helpers import Small, assert_same, assert_same_bits, both, filled, weights


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda: torch.zeros(1).expand(3, 3), id="expanded"),
        pytest.param(lambda: torch.zeros(5).unfold(0, 3, 1), id="overlapping"),
        pytest.param(lambda: torch.zeros(3, 6)[:, ::2], id="strided"),
    ],
)
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_targets_of_any_layout_get_the_values(tmp_path, layout, kind):
    """An expanded, overlapping or strided target holds the file's values after, and nothing else is written over."""
    model = nn.Module()
    if kind == "buffer":
        model.register_buffer("w", layout())
    else:
        model.w = nn.Parameter(layout())
    value = torch.arange(9.0).reshape(3, 3) + 1
    torch.save({"w": value}, tmp_path / "a.pth")
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.w.detach(), value)


@pytest.mark.parametrize("stored", ["row-major", "channels-last", "transposed"])
@pytest.mark.parametrize("own", ["row-major", "channels-last"])
def test_memory_formats_of_file_and_model_are_independent(tmp_path, stored, own):
    """Any layout in the file fills any layout in the model, which keeps its own."""
    value = torch.rand(2, 3, 4, 5)
    kept = {
        "row-major": value,
        "channels-last": value.contiguous(memory_format=torch.channels_last),
        "transposed": value.transpose(2, 3).contiguous().transpose(2, 3),
    }[stored]
    model = nn.ParameterDict({"w": torch.zeros(2, 3, 4, 5)})
    if own == "channels-last":
        model.to(memory_format=torch.channels_last)
    stride = model["w"].stride()
    torch.save({"w": kept}, tmp_path / "plain.pth")
    anycard.save({"w": kept}, tmp_path / "ours.pth")
    anycard.save({"w": kept}, tmp_path / "ours.safetensors")
    for name in ("plain.pth", "ours.pth", "ours.safetensors"):
        nn.init.zeros_(model["w"])
        anycard.load(tmp_path / name, model)
        assert_same_bits(model["w"].detach(), value)
        assert model["w"].stride() == stride


def test_a_model_of_odd_layouts_is_saved(tmp_path):
    """Expanded, overlapping, flipped and permuted tensors go out in every format and read back equal."""
    model = nn.Module()
    model.register_buffer("expanded", torch.rand(1).expand(4, 4))
    model.register_buffer("overlapping", torch.arange(5.0).unfold(0, 3, 1))
    model.register_buffer("part", torch.rand(3, 4)[:, 1:3])
    model.weight = nn.Parameter(torch.rand(2, 3, 4).permute(2, 0, 1))
    want = weights(model)
    for suffix in (".pth", ".safetensors"):
        anycard.save(model, tmp_path / f"a{suffix}")
        assert_same(anycard.read(tmp_path / f"a{suffix}"), want)
    assert_same(torch.load(tmp_path / "a.pth", weights_only=True), want)
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    assert_same(weights(torch.load(tmp_path / "whole.pt", weights_only=False)), want)


@pytest.mark.parametrize("how", [{"suffix": ".pth"}, {"suffix": ".safetensors"}, {"suffix": ".pt", "whole": True}])
def test_a_slice_of_a_large_tensor_is_saved_small(tmp_path, how):
    """A view writes its own bytes only, whatever it is a view of."""
    model = nn.Module()
    model.register_buffer("x", torch.rand(100_000)[10:20])
    path = tmp_path / f"a{how['suffix']}"
    anycard.save(model, path, whole=how.get("whole", False))
    assert path.stat().st_size < 5000


def test_tensor_subclasses_stay_what_they_are(tmp_path):
    """A parameter of a tensor subclass is filled and keeps its class."""

    class Marked(torch.Tensor):
        pass

    def build() -> nn.Module:
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(3).as_subclass(Marked))
        model.register_buffer("b", torch.zeros(3).as_subclass(Marked))
        return model

    torch.save({"w": torch.rand(3), "b": torch.rand(3)}, tmp_path / "a.pth")
    theirs = build()
    theirs.load_state_dict(torch.load(tmp_path / "a.pth"))
    for target in (build, build()):
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert type(loaded.w.data) is type(theirs.w.data)
        assert type(loaded.b) is Marked
        for name in ("w", "b"):
            got, want = (getattr(m, name).detach().as_subclass(torch.Tensor) for m in (loaded, theirs))
            assert_same_bits(got, want)


def test_a_model_built_in_inference_mode(tmp_path):
    """Inference tensors have no version: they are filled all the same, in and out of the mode."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    with torch.inference_mode():
        model = filled(Small(), 5)
        anycard.load(tmp_path / "a.pth", model)
        fresh = anycard.load(tmp_path / "a.pth", Small)
    assert_same(weights(model), weights(source))
    assert_same(weights(fresh), weights(source))


def test_a_model_that_is_there_already_keeps_its_memory(tmp_path):
    """device= by another spelling of where the model stands is no reason for new memory."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    for device in ("cpu", "cpu:0", torch.device("cpu", 0)):
        model = filled(Small(), 5)
        places = [tensor.data_ptr() for tensor in model.state_dict().values()]
        anycard.load(tmp_path / "a.pth", model, device=device)
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
        assert_same(weights(model), weights(filled(Small())))


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's cards")
def test_a_model_on_apples_card_is_filled_there(tmp_path):
    """What torch gives there for a tensor's address is none: neighbours do not count as one memory."""
    build = lambda: nn.Sequential(*[nn.Linear(300, 300) for _ in range(20)])  # noqa: E731
    anycard.save(filled(build()), tmp_path / "a.pth")
    model = filled(build(), 5).to("mps")
    anycard.load(tmp_path / "a.pth", model, device="mps")
    assert_same({name: tensor.cpu() for name, tensor in weights(model).items()}, weights(filled(build())))


def test_a_load_makes_an_old_backward_pass_fail_loudly(tmp_path):
    """Gradients through values that a load has replaced are an error of autograd, not wrong numbers."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)
    model.eval()
    loss = (model.head(model.norm(model.stem(torch.rand(2, 2, 3))).squeeze(-1)) ** 2).sum()
    anycard.load(tmp_path / "a.pth", model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_gradients_after_a_load(tmp_path, dtype):
    """A model that was trained before is trained on after a load, also in another dtype."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)
    model.stem(torch.rand(1, 2, 4)).sum().backward()
    held = model.stem.weight.grad
    anycard.load(tmp_path / "a.pth", model, dtype=dtype)
    if dtype is None:
        assert model.stem.weight.grad is held
    model.stem(torch.rand(1, 2, 4).to(dtype or torch.float32)).sum().backward()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parameters_keep_their_identity(tmp_path, dtype):
    """An optimizer that holds the parameters goes on with the loaded ones; gradients and flags stay."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5)
    model.stem.weight.requires_grad_(False)
    held = list(model.parameters())
    anycard.load(tmp_path / "a.pth", model, dtype=dtype)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * (len(held) - 1)]
    assert all(p.is_leaf for p in model.parameters())


def test_a_model_in_shared_memory_is_filled_there(tmp_path):
    """share_memory(): other processes see the loaded values, for it is the same memory."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    model = filled(Small(), 5).share_memory()
    place = model.stem.weight.data_ptr()
    anycard.load(tmp_path / "a.pth", model)
    assert model.stem.weight.is_shared() and model.stem.weight.data_ptr() == place
    assert_same(weights(model), weights(filled(Small())))
    assert_same(weights(anycard.load(tmp_path / "a.pth", lambda: Small().share_memory())), weights(filled(Small())))


@pytest.mark.parametrize("mode", ["context", "default"])
def test_a_default_device_of_the_callers_does_not_matter(tmp_path, mode):
    """Under `torch.device(...)` or set_default_device, read gives CPU tensors and load fills."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    model = filled(Small(), 5)
    if mode == "context":
        with torch.device("meta"):
            got = anycard.read(tmp_path / "a.pth")
            anycard.load(tmp_path / "a.pth", model)
            anycard.save(model, tmp_path / "b.pth")
    else:
        torch.set_default_device("meta")
        try:
            got = anycard.read(tmp_path / "a.pth")
            anycard.load(tmp_path / "a.pth", model)
            anycard.save(model, tmp_path / "b.pth")
        finally:
            torch.set_default_device(None)
    assert_same(got, weights(source))
    assert_same(weights(model), weights(source))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_a_default_dtype_of_the_callers_does_not_matter(tmp_path):
    """set_default_dtype changes what a factory builds, never what is read."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    torch.set_default_dtype(torch.float64)
    try:
        got = anycard.read(tmp_path / "a.pth")
        loaded = anycard.load(tmp_path / "a.pth", Small)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, weights(source))
    assert loaded.head.weight.dtype == torch.float64
    assert_same_bits(loaded.head.weight, source.head.weight.double())


def test_other_modes_of_torch_do_not_disturb(tmp_path):
    """no_grad, a dispatch mode of the caller's, deterministic algorithms: a load gives the same."""
    anycard.save(filled(Small()), tmp_path / "a.pth")
    want = weights(filled(Small()))
    with torch.no_grad():
        loaded = anycard.load(tmp_path / "a.pth", Small)
    assert loaded.stem.weight.requires_grad
    assert_same(weights(loaded), want)
    with FlopCounterMode(display=False):
        assert_same(weights(anycard.load(tmp_path / "a.pth", Small)), want)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(weights(anycard.load(tmp_path / "a.pth", Small)), want)
        assert_same(anycard.read(tmp_path / "a.pth"), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_modules_without_elements_and_without_tensors(tmp_path, suffix):
    """An embedding of nothing and a layer without parameters are part of a model like any other."""

    def build() -> nn.Module:
        return nn.ModuleDict({"none": nn.Embedding(0, 3), "act": nn.ReLU(), "fc": nn.Linear(2, 2)})

    anycard.save(filled(build()), tmp_path / f"a{suffix}")
    for target in both(build):
        assert_same(weights(anycard.load(tmp_path / f"a{suffix}", target)), weights(filled(build())))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_without_any_tensor(tmp_path, suffix):
    """A model of nothing but activations goes out and comes back, as load_state_dict lets it."""
    anycard.save(nn.ReLU(), tmp_path / f"a{suffix}")
    anycard.load(tmp_path / f"a{suffix}", nn.ReLU())
