"""Tensors that take other bytes than the file has (of another dtype, or strides) and are larger than a chunk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import anycard
from anycard.limits import Limits
from anycard.torch.parts import parts
from anycard.torch.reading import Fill, Fills, prepare
from helpers import assert_same_bits, unchanged

ROWS, COLUMNS = 1100, 2003  # of four bytes: more than a chunk, and of no round number

LAYOUTS = {
    "row-major": lambda x: x.clone(),
    "transposed": lambda x: x.t().contiguous().t(),
    "with gaps": lambda x: x.new_zeros(ROWS, COLUMNS, 2)[..., 1].copy_(x),
    "of two": lambda x: x.new_zeros(2, ROWS, COLUMNS + 5)[1, :, 5:].copy_(x),
}


def values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.arange(ROWS * COLUMNS, dtype=torch.float64).reshape(ROWS, COLUMNS) - 1e6
    return made.to(dtype) * (1 + 2j) if dtype.is_complex else made.to(dtype)


class One(nn.Module):
    """One tensor, as a parameter."""

    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(held, requires_grad=False)


@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize("own", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_of_any_layout_fill_any_other(tmp_path, stored, own, dtype):
    """The model has the values that the file has, in the model's dtype, however either of them lies in memory."""
    value = values()
    torch.save({"w": LAYOUTS[stored](value)}, tmp_path / "a.pth")
    model = One(LAYOUTS[own](torch.zeros(ROWS, COLUMNS, dtype=dtype)))
    version = model.w._version
    anycard.load(tmp_path / "a.pth", model, verify=True)
    assert_same_bits(model.w, value.to(dtype))
    assert model.w._version > version


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "conj", "neg"])
def test_large_tensors_of_any_layout_are_saved(tmp_path, suffix, layout):
    """What is written is the tensor's elements, however it lies in memory."""
    value = values(torch.complex64 if layout in ("conj", "neg") else torch.float32)
    turned = {"conj": lambda x: x.conj(), "neg": lambda x: x.conj().imag}.get(layout) or LAYOUTS[layout]
    given_out = turned(value)
    anycard.save({"w": given_out}, tmp_path / f"a{suffix}")
    assert_same_bits(anycard.read(tmp_path / f"a{suffix}")["w"], given_out.resolve_conj().resolve_neg())


shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)


@st.composite
def laid_out(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a shape, its dimensions in any order, with gaps or without."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(0, 1)) for _ in shape]
    held = torch.zeros([shape[dim] + gap for dim, gap in zip(order, gaps, strict=True)], dtype=dtype)
    held = held[tuple(slice(gap, None) for gap in gaps)]
    return held.permute([order.index(dim) for dim in range(len(shape))])


@settings(deadline=None)
@given(data=st.data(), shape=shapes)
def test_parts_are_the_elements_in_order(data, shape):
    """The parts of any stretch of any tensor hold its elements, in order, and are views of it."""
    tensor = data.draw(laid_out(shape, torch.int64))
    tensor.copy_(torch.arange(tensor.numel()).reshape(shape))
    first, last = sorted((data.draw(st.integers(0, tensor.numel())), data.draw(st.integers(0, tensor.numel()))))
    found = list(parts(tensor, first, last))
    assert [value for part in found for value in part.reshape(-1).tolist()] == list(range(first, last))
    assert all(part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for part in found)
    assert len(found) <= 2 * max(1, len(shape))


@settings(deadline=None)
@given(data=st.data(), shape=shapes, chunk=st.integers(1, 200))
def test_chunks_of_any_size_make_the_same_tensors(tmp_path_factory, data, shape, chunk):
    """Stored and own layouts, dtypes and the size of a chunk are independent."""
    stored = data.draw(laid_out(shape, data.draw(st.sampled_from([torch.float32, torch.float64, torch.int16]))))
    stored.copy_(torch.arange(stored.numel()).reshape(shape))
    own = data.draw(laid_out(shape, torch.float64))
    path = tmp_path_factory.mktemp("chunks") / "a.pth"
    torch.save({"a": torch.ones(3), "x": stored}, path)
    with anycard.open(path) as ckpt:
        fills = Fills.of([Fill(own, ckpt.tensors["x"], "x")])
        prepare(fills).run(limits=Limits(chunk_nbytes=chunk))
    assert_same_bits(own, stored.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_of_inference_mode_takes_other_dtypes(tmp_path, dtype):
    """Its tensors refuse to be written outside of that mode; a load from outside fills them all the same."""
    value = values()
    torch.save({"w": value}, tmp_path / "a.pth")
    with torch.inference_mode():
        model = One(torch.zeros(ROWS, COLUMNS, dtype=dtype))
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.w.clone(), value.to(dtype))


def test_damage_in_any_chunk_is_found(tmp_path):
    """One flipped bit in the second chunk of a tensor that is cast: named, and an existing model is as it was."""
    path = tmp_path / "a.pth"
    anycard.save({"w": values()}, path)
    data = bytearray(path.read_bytes())
    with anycard.open(path) as ckpt:
        data[ckpt.tensors["w"].offset + (8 << 20) + 99] ^= 1
    path.write_bytes(data)
    model = One(torch.zeros(ROWS, COLUMNS, dtype=torch.float16))
    with unchanged(model), pytest.raises(anycard.FormatError, match="1 damaged: w"):
        anycard.load(path, model, verify=True)
    with pytest.raises(anycard.FormatError, match="w is damaged"):
        anycard.load(path, lambda: One(torch.zeros(ROWS, COLUMNS)), dtype=torch.float16)


EXTRA = """
import resource, sys, torch, anycard
from torch import nn
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
path, act = sys.argv[1:]
model = nn.Linear(20, 10).half()
anycard.save(model, path + ".small.pth")
anycard.load(path + ".small.pth", model.float())  # what the first of all takes is not what a large one takes
model = nn.Module()
if act == "cast":
    model.w = nn.Parameter(torch.ones(20_000_000, 2, dtype=torch.float64))
elif act == "strides":
    model.w = nn.Parameter(torch.ones(2, 20_000_000, 2)[..., 0].t())
else:
    model.w = nn.Parameter(torch.ones(2, 20_000_000, 2)[..., 0])
before = used()
anycard.save(model, path) if act == "save" else anycard.load(path, model)
print((used() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of a process is told on Unix")
@pytest.mark.parametrize("act", ["cast", "strides", "save"])
def test_a_tensor_that_takes_a_copy_takes_no_second_memory_of_its_size(tmp_path, act):
    """A tensor of 160 MB is cast, or laid out anew, in a few chunks of memory, when loaded and when saved."""
    anycard.save({"w": torch.ones(20_000_000, 2)}, tmp_path / "a.pth")
    done = subprocess.run(
        [sys.executable, "-c", EXTRA, str(tmp_path / "a.pth"), act], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 64, done.stdout
