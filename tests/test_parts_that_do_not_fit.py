"""Files that fit a model in part: other shapes, other dtypes, names on one side only, and only=."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import anycard
from helpers import Small, assert_same, assert_same_bits, filled, quiet, refused, told, unchanged, weights


@pytest.mark.parametrize("stored", [1, 10])
@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors", "ours"])
def test_another_number_of_classes(tmp_path, stored, how):
    """A head of another size: refused with both sizes; strict=False fills the rest and keeps the head."""
    source = filled(Small(stored))
    path = tmp_path / "a.pth"
    if how == "safetensors":
        save_file(weights(source), path)
    elif how == "ours":
        anycard.save(source, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=how == "zip")
    model = filled(Small(3), 5)
    before = weights(model)
    error = refused(lambda: anycard.load(path, model), model, "head.weight", "head.bias", f"{stored} x 4", "3 x 4")
    assert error.plan.shapes["head.bias"] == ((stored,), (3,))
    told(lambda: anycard.load(path, model, strict=False), "head.weight", "head.bias")
    want = weights(source) | {k: v for k, v in before.items() if k.startswith("head.")}
    assert_same(weights(model), want)


@pytest.mark.parametrize(
    ("stored", "own"), [((1, 4), (3, 4)), ((4,), (4, 1)), ((2, 6), (3, 4)), ((1, 1), ()), ((1,), (1, 1)), ((0,), (1,))]
)
def test_shapes_never_broadcast(tmp_path, stored, own):
    """Another shape is another shape, though torch's copy_ would stretch it."""
    model = nn.ParameterDict({"w": torch.zeros(own), "v": torch.zeros(2)})
    torch.save({"w": torch.ones(stored), "v": torch.ones(2)}, tmp_path / "a.pth")
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "w")


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_element_into_a_scalar(tmp_path, shape):
    """`(1,)` into `()` is the exception that torch makes, too; the model's shape stays."""
    model = nn.ParameterDict({"w": torch.zeros(())})
    torch.save({"w": torch.full(shape, 3.0)}, tmp_path / "a.pth")
    anycard.load(tmp_path / "a.pth", model)
    assert model["w"].shape == () and model["w"].item() == 3.0


@pytest.mark.parametrize("only_in", ["file", "model"])
def test_leftover_buffers_on_either_side(tmp_path, only_in):
    """Counters of a tool on one side only: named, strict=False loads the rest and keeps what the file lacks."""

    def counted(model: nn.Module) -> nn.Module:
        for module in (model.stem, model.head):
            module.register_buffer("flops__", torch.tensor([5, 6]))
        return model

    source, model = filled(Small()), filled(Small(), 5)
    (counted(source) if only_in == "file" else counted(model))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    before = weights(model)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "stem.flops__", "head.flops__")
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "stem.flops__")
    assert_same({k: v for k, v in weights(model).items() if "flops" not in k}, weights(filled(Small())))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "flops" in k)


def test_buffers_that_a_new_version_added(tmp_path):
    """Frequencies, ids, masks, norms of weights: persistent buffers that an old file lacks are computed."""

    class Versioned(nn.Module):
        def __init__(self, new: bool = True) -> None:
            super().__init__()
            self.word = nn.Embedding(8, 4)
            if new:
                self.register_buffer("frequency", 1.0 / (10000 ** (torch.arange(0, 4, 2).float() / 4)))
                self.register_buffer("ids", torch.arange(6).expand(1, -1))
                self.register_buffer("mask", torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4))
                self.register_buffer("length", self.word.weight.detach().norm(dim=1))

    torch.save(filled(Versioned(new=False)).state_dict(), tmp_path / "a.pth")
    with quiet():
        loaded = anycard.load(tmp_path / "a.pth", Versioned, strict=False)
    for name in ("frequency", "ids", "mask"):
        assert_same_bits(getattr(loaded, name), getattr(Versioned(), name), name)
    assert (loaded.length > 0).all() and loaded.length.isfinite().all()
    assert_same_bits(loaded.word.weight, filled(Versioned(new=False)).word.weight)


def test_a_load_of_nothing_is_never_silent(tmp_path):
    """A file whose names fit nothing is an error with strict=False, too."""
    torch.save({f"other.{k}x": v for k, v in weights(filled(Small())).items()}, tmp_path / "a.pth")
    model = filled(Small(), 5)
    for strict in (True, False):
        with unchanged(model), pytest.raises(anycard.MismatchError):
            anycard.load(tmp_path / "a.pth", model, strict=strict)


@pytest.mark.parametrize("only", ["stem", "stem.*", ["stem.weight", "stem.bias"], lambda n: n.startswith("stem")])
def test_only_what_was_asked_for_changes(tmp_path, only):
    """only= as a name, a glob, a list and a function: the rest may be of another shape and stays."""
    source, model = filled(Small()), filled(Small(5), 5)
    anycard.save(source, tmp_path / "a.pth")
    want = weights(model) | {k: v for k, v in weights(source).items() if k.startswith("stem")}
    anycard.load(tmp_path / "a.pth", model, only=only)
    assert_same(weights(model), want)
    with unchanged(model), pytest.raises(ValueError, match="matches none"):
        anycard.load(tmp_path / "a.pth", model, only="nothing*")


def test_only_in_a_factory_initialises_the_rest(tmp_path):
    """What only= leaves out of a built model is initialised, not left as memory happened to be."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    loaded = anycard.load(tmp_path / "a.pth", Small, only="stem")
    assert_same_bits(loaded.stem.weight, source.stem.weight)
    assert 0 < loaded.head.weight.abs().max() <= 0.5
    assert_same_bits(loaded.norm.running_var, torch.ones(4))


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (torch.float32, torch.int64), (torch.float64, torch.uint8), (torch.bfloat16, torch.int32),
        (torch.complex64, torch.float32), (torch.float16, torch.bool), (torch.int64, torch.bool),
    ],
)  # fmt: skip
def test_a_cast_that_loses_a_kind_is_refused(tmp_path, stored, own):
    """Float into integer and the like: both dtypes are said, the model is as it was."""
    torch.save({"w": torch.ones(3), "b": torch.ones(2, dtype=stored)}, tmp_path / "a.pth")
    model = nn.ParameterDict({"w": torch.zeros(3)})
    model.register_buffer("b", torch.zeros(2, dtype=own))
    words = [str(d).removeprefix("torch.") for d in (stored, own)]
    assert all(word in str(anycard.plan(tmp_path / "a.pth", model)) for word in words)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "b", *words)


def test_a_refused_cast_is_left_out_where_that_is_asked(tmp_path):
    """strict=False: the float for an integer buffer is left out and said, the rest loads."""
    torch.save({"w": torch.ones(3), "b": torch.ones(2)}, tmp_path / "a.pth")
    model = nn.ParameterDict({"w": torch.zeros(3)})
    model.register_buffer("b", torch.zeros(2, dtype=torch.int64))
    told(lambda: anycard.load(tmp_path / "a.pth", model, strict=False), "b", "int64")
    assert_same(weights(model), {"w": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.float8_e4m3fn, torch.float32),
        (torch.int32, torch.int64), (torch.bool, torch.int64), (torch.int64, torch.float32),
        (torch.uint16, torch.int32), (torch.float32, torch.complex64),
    ],
)  # fmt: skip
def test_a_cast_within_a_kind_is_torchs(tmp_path, stored, own):
    """The model keeps its dtype, and the values are those of torch's own cast."""
    value = torch.tensor([0, 1, 3]).to(torch.float32).to(stored)
    torch.save({"b": value}, tmp_path / "a.pth")
    model = nn.Module()
    model.register_buffer("b", torch.zeros(3, dtype=own))
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.b, value.to(own))


def test_dtype_is_for_floats_only(tmp_path):
    """dtype= as a dtype or its name changes floats; counters, integers and complex numbers stay."""
    source = filled(Small())
    source.register_buffer("rotation", torch.ones(2, dtype=torch.complex64))
    source.register_buffer("ids", torch.arange(2))
    anycard.save(source, tmp_path / "a.pth")
    for dtype in ("float16", "torch.float16", torch.float16):
        loaded = anycard.load(tmp_path / "a.pth", copy.deepcopy(source), dtype=dtype)
        assert (loaded.rotation.dtype, loaded.ids.dtype) == (torch.complex64, torch.int64)
        assert {p.dtype for p in loaded.parameters()} == {torch.float16}
        assert (loaded.norm.running_mean.dtype, loaded.norm.num_batches_tracked.dtype) == (torch.float16, torch.int64)
    with unchanged(source), pytest.raises(ValueError, match="float33"):
        anycard.load(tmp_path / "a.pth", source, dtype="float33")


def test_nearest_names_are_told_with_only(tmp_path):
    """What was asked for and is called otherwise in the file is found there, as it is without `only=`."""
    anycard.save({"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)}, tmp_path / "a.pth")
    model = nn.ModuleDict({"head": nn.Linear(2, 3)})
    assert anycard.plan(tmp_path / "a.pth", model, only="head").nearest["head.weight"] == "fc.weight"


def test_a_rename_that_changes_nothing_is_said(tmp_path):
    """A slip in it would go unseen: a warning where the file fits all the same, and told where it does not."""
    anycard.save(filled(nn.Linear(2, 2)), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"rename= changes none of the file's names, such as 'weight'"):
        anycard.load(tmp_path / "a.pth", nn.Linear(2, 2), rename={"wieght": "bias"})
    with pytest.raises(anycard.MismatchError, match="rename= changes none"):
        anycard.load(tmp_path / "a.pth", nn.ModuleDict({"head": nn.Linear(2, 2)}), rename={"fc": "head"})
    plan = anycard.plan(tmp_path / "a.pth", nn.ModuleDict({"head": nn.Linear(2, 2)}), rename=[("^", "head.")])
    assert plan.fits and not plan.notes


def test_a_name_outside_of_the_part_that_fits_is_told_by_its_place(tmp_path):
    """All but one name begin with `module.`: the one is missing and unexpected at once, which needs a word."""
    state = {f"module.{name}": tensor for name, tensor in filled(Small()).state_dict().items()}
    name = next(iter(state))
    state[name.removeprefix("module.")] = state.pop(name)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(anycard.MismatchError, match=r"unexpected  .* in the file it lies beside 'module'"):
        anycard.load(tmp_path / "a.pth", Small())


def test_one_ranks_part_of_a_sharded_model(tmp_path):
    """`torch.save` of a sharded model's state dict on each rank: said to be parts, and how to save the whole."""
    parts = {"weight._local_tensor": torch.ones(2, 2), "bias._local_tensor": torch.ones(2)}
    torch.save(parts, tmp_path / "a.pth")
    with pytest.raises(anycard.MismatchError, match="one rank's part of each DTensor"):
        anycard.load(tmp_path / "a.pth", nn.Linear(2, 2))


@pytest.mark.parametrize("device", [93, "meta"])
def test_devices_that_cannot_be_loaded_to(tmp_path, device):
    """A card's number where there is none, and the meta device: refused by load and plan, with what there is to do."""
    anycard.save(nn.Linear(2, 2), tmp_path / "a.pth")
    for ask in (anycard.load, anycard.plan):
        with pytest.raises(anycard.DeviceError, match=r"This machine has: cpu|no memory to load into"):
            ask(tmp_path / "a.pth", nn.Linear(2, 2), device=device)
