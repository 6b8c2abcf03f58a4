"""Shared memory: tied weights in the model, in the file, in both, and views of one storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import anycard
from helpers import (
    Language,
    Small,
    assert_same,
    assert_same_bits,
    both,
    filled,
    on_meta,
    quiet,
    refused,
    told,
    unchanged,
    weights,
)


@pytest.mark.parametrize("odd", ["wte.weight", "lm_head.weight", "aux.head.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_tied_in_the_model_but_different_in_the_file(tmp_path, odd, strict):
    """One of three stored copies differs: both names are said, whichever it is, and nothing changes."""
    state = {k: v.clone() for k, v in weights(filled(Language())).items()}
    state[odd] = state[odd] + 1
    torch.save(state, tmp_path / "a.pth")
    model = filled(Language(), 5)
    error = refused(lambda: anycard.load(tmp_path / "a.pth", model, strict=strict), model, odd)
    assert error.plan is not None
    assert model.is_tied()


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight", "aux.head.weight"])
@pytest.mark.parametrize("write", [torch.save, save_file], ids=["zip", "safetensors"])
def test_tied_and_stored_once_under_any_name(tmp_path, kept, write):
    """Any one of the names is enough; the tie stays."""
    source = filled(Language())
    write({kept: source.wte.weight.detach().clone()}, tmp_path / "a")
    for target in both(Language):
        loaded = anycard.load(tmp_path / "a", target)
        assert loaded.is_tied()
        assert_same_bits(loaded.wte.weight, source.wte.weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tied_out_untied_in(tmp_path, suffix):
    """Tied weights load into a model that does not tie them: each name gets the values, no memory is shared."""
    source = filled(Language())
    anycard.save(source, tmp_path / f"a{suffix}")
    for target in (lambda: Language(tied=False), Language(tied=False)):
        loaded = anycard.load(tmp_path / f"a{suffix}", target)
        assert_same(weights(loaded), weights(source))
        assert loaded.wte.weight.data_ptr() != loaded.lm_head.weight.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_ties_survive_a_change_of_dtype(tmp_path, dtype):
    """Ties stay with dtype=, as they do without."""
    anycard.save(filled(Language()), tmp_path / "a.pth")
    for target in both(Language):
        loaded = anycard.load(tmp_path / "a.pth", target, dtype=dtype)
        assert loaded.is_tied()
        assert loaded.wte.weight.dtype == (dtype or torch.float32)


class Transposed(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed: two parameters, one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 2, bias=False)
        self.decoder = nn.Linear(2, 4, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_transposed_tie(tmp_path, suffix):
    """Two parameters that are one memory, one of them transposed, keep values and memory."""
    source = filled(Transposed())
    path = tmp_path / f"a{suffix}"
    anycard.save(source, path)
    for target in both(Transposed):
        loaded = anycard.load(path, target)
        assert_same(weights(loaded), weights(source))
        assert loaded.decoder.weight.data_ptr() == loaded.encoder.weight.data_ptr()


def test_a_transposed_tie_that_the_file_contradicts(tmp_path):
    """One memory in the model, two contradictory tensors in the file: said, not written over one another."""
    state = {"encoder.weight": torch.rand(2, 4), "decoder.weight": torch.rand(4, 2)}
    torch.save(state, tmp_path / "a.pth")
    model = filled(Transposed(), 5)
    with unchanged(model):
        told(lambda: anycard.load(tmp_path / "a.pth", model), "encoder.weight", "decoder.weight")


def test_a_missing_part_of_a_shared_memory_is_initialised(tmp_path):
    """Two parameters are views of one memory; the file has one: the factory's other one is initialised."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.empty(8)
            self.a = nn.Parameter(memory[:4])
            self.b = nn.Parameter(memory[4:])
            nn.init.constant_(self.a, 1.0)
            nn.init.constant_(self.b, 2.5)

    torch.save({"a": torch.full((4,), 7.0)}, tmp_path / "a.pth")
    with quiet():
        loaded = anycard.load(tmp_path / "a.pth", Views, strict=False)
    assert_same(
        {k: v.detach() for k, v in loaded.named_parameters()}, {"a": torch.full((4,), 7.0), "b": torch.full((4,), 2.5)}
    )


def test_a_buffer_that_is_a_parameters_memory(tmp_path):
    """A buffer that aliases a parameter stays its alias, and has its values."""

    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("mirror", self.fc.weight.detach())

    source = filled(Alias())
    anycard.save(source, tmp_path / "a.pth")
    for target in both(Alias):
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert_same(weights(loaded), weights(source))
        assert loaded.mirror.data_ptr() == loaded.fc.weight.data_ptr()


class TwoBuffers(nn.Module):
    """One buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.zeros(3)
        self.register_buffer("a", memory)
        self.register_buffer("b", memory)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tied_buffers_stay_one(tmp_path, dtype):
    """Ties of buffers hold like those of parameters: built, existing, on meta, cast."""
    anycard.save(filled(TwoBuffers()), tmp_path / "a.pth")
    for target in (TwoBuffers, TwoBuffers(), on_meta(TwoBuffers)):
        loaded = anycard.load(tmp_path / "a.pth", target, dtype=dtype)
        assert loaded.a is loaded.b
        assert_same_bits(loaded.a, filled(TwoBuffers()).a.to(dtype or torch.float32))


def test_parameters_that_are_views_of_one_flat_memory(tmp_path):
    """A flattened model is saved like any other, and is filled within its flat memory."""
    source = filled(Small())
    anycard.save(source, tmp_path / "a.pth")
    model = filled(Small(), 5)
    flat, start = torch.zeros(sum(p.numel() for p in model.parameters())), 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    anycard.load(tmp_path / "a.pth", model)
    assert_same(weights(model), weights(source))
    assert_same_bits(flat, nn.utils.parameters_to_vector(source.parameters()).detach())
    anycard.save(model, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_views_of_one_storage_stay_together_in_a_whole_model(tmp_path):
    """In a whole model two overlapping views share memory after loading, as before; only their span is written."""
    memory = torch.rand(100_000)
    model = nn.Module()
    model.register_buffer("x", memory[10:20])
    model.register_buffer("y", memory[15:30])
    anycard.save(model, tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").stat().st_size < 5000
    for loaded in (torch.load(tmp_path / "a.pt", weights_only=False), anycard.load(tmp_path / "a.pt")):
        loaded.x[5] = -1
        assert loaded.y[0] == -1


def with_buffers(**buffers: torch.Tensor) -> nn.Module:
    """A module of these buffers."""
    model = nn.Module()
    for name, tensor in buffers.items():
        model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "int32"), ("uint8", "float64"), ("complex64", "float32")])
def test_two_dtypes_over_one_memory_in_a_whole_model(tmp_path, dtypes, mmap):
    """Plain PyTorch, which takes a record for the dtype that it meets first, reads both as they were."""
    memory = torch.arange(64, dtype=torch.uint8)
    seen = [memory[8:40].view(getattr(torch, dtype)) for dtype in dtypes]
    model = with_buffers(x=seen[0], y=seen[1], z=seen[0][1:])
    anycard.save(model, tmp_path / "a.pt", whole=True)
    for loaded in (
        torch.load(tmp_path / "a.pt", weights_only=False, mmap=mmap),
        anycard.load(tmp_path / "a.pt"),
    ):
        assert_same(weights(loaded), weights(model))
        assert loaded.z.data_ptr() == loaded.x[1:].data_ptr()


def test_storages_of_different_size_at_one_address(tmp_path):
    """A short storage and a long one that begin at the same address keep every element, and stay one memory."""
    array = np.arange(1, 11, dtype=np.float32)
    for cuts in ((2, 10), (10, 2)):
        model = with_buffers(x=torch.from_numpy(array[: cuts[0]]), y=torch.from_numpy(array[: cuts[1]]))
        anycard.save(model, tmp_path / "a.pt", whole=True)
        for loaded in (torch.load(tmp_path / "a.pt", weights_only=False), anycard.load(tmp_path / "a.pt")):
            assert_same(weights(loaded), weights(model))
            assert loaded.x.data_ptr() == loaded.y.data_ptr()


def test_a_whole_model_holds_nothing_of_what_lies_beside_its_views(tmp_path):
    """Foreign bytes around a view neither reach the file nor change it."""
    files = []
    for beside in (b"x:SECRET-KEY....", b"x:another-thing."):
        memory = torch.frombuffer(bytearray(beside), dtype=torch.uint8)
        anycard.save(with_buffers(x=memory[:1], y=memory[9:9]), tmp_path / "a.pt", whole=True)
        files.append((tmp_path / "a.pt").read_bytes())
    assert files[0] == files[1] and b"SECRET" not in files[0]


@pytest.mark.parametrize("second", ["format", "anycard", "anycard.fingerprint"])
def test_a_second_name_that_safetensors_metadata_keeps_for_itself(tmp_path, second):
    """Such a tie is written as a tensor of its own, by save and by convert; nothing of the file's own record goes."""
    tied = torch.arange(3.0)
    held = {"first": tied, second: tied, "third": tied}
    anycard.save(held, tmp_path / "a.safetensors")
    anycard.save(held, tmp_path / "a.pt")
    anycard.convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        assert_same(anycard.read(tmp_path / name), held)
        assert_same(load_file(tmp_path / name), {"first": tied, second: tied})
        with anycard.open(tmp_path / name) as ckpt:
            assert ckpt.marked and ckpt.metadata["format"] == "pt"
        assert anycard.verify(tmp_path / name).checked
    assert anycard.diff(tmp_path / "a.pt", tmp_path / "b.safetensors").equal


NOTES = {"target": "weight", "best": "head.weight", "note": "text", "format": "pt"}


def test_notes_that_name_a_tensor_are_no_ties(tmp_path):
    """Anyone may write metadata beside a tensor's name; a tie is called the same in two modules."""
    held = {"weight": torch.ones(2), "head.weight": torch.zeros(3), "block.w1": torch.ones(1)}
    ties = {"embed.weight": "head.weight", "block.w2": "block.w1"}
    save_file(held, tmp_path / "a.safetensors", metadata={**NOTES, **ties})
    assert_same(anycard.read(tmp_path / "a.safetensors"), {**held, **{name: held[kept] for name, kept in ties.items()}})
