"""Properties: whatever torch can save we read back bit for bit, and torch reads what we write."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import anycard
from helpers import assert_same, assert_same_bits, bits, filled, quiet, weights
from strategies import (
    SAFETENSORS_DTYPES,
    STATELESS,
    Nested,
    OnlyModule,
    nested_states,
    state_dicts,
    wrap_inside,
    wrappings,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
many = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
COUNT = itertools.count()


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Full path -> tensor, as `ckpt.tensors` spells it."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(value, f"{path}.{key}" if path else str(key))


SAVERS = st.sampled_from(
    [{"_use_new_zipfile_serialization": False}, *({"pickle_protocol": n} for n in (2, 3, 4, 5)), {}]
)


@many
@given(state=state_dicts(plain=True), how=SAVERS)
def test_a_state_dict_that_torch_wrote_is_read_equal(scratch, state, how):
    """Any state dict, zip or legacy, any pickle protocol: read gives its tensors bit for bit."""
    path = scratch / "theirs.pth"
    torch.save(state, path, **how)
    with quiet():
        got = anycard.read(path, canonical=False)
    assert_same(got, tensors_of(state))


@many
@given(tree=nested_states(), how=SAVERS)
def test_every_tensor_of_a_nested_file_is_listed_and_read(scratch, tree, how):
    """Nested dicts and lists: open lists every tensor by its path; torch() and numpy(raw=True) give its bits."""
    want = list(flat(tree))
    if len(dict(want)) < len(want):
        return
    path = scratch / "nested.ckpt"
    torch.save(tree, path, **how)
    with anycard.open(path) as ckpt:
        assert set(ckpt.tensors) == set(dict(want))
        for name, tensor in want:
            assert_same_bits(ckpt.torch(name), tensor, name)
            array = ckpt.numpy(name, raw=True)
            assert array.shape == tuple(tensor.shape) or not tensor.dim(), name
            assert array.tobytes() == bits(tensor), name


@many
@given(state=state_dicts(plain=True))
def test_torch_reads_what_we_write(scratch, state):
    """Plain torch, mapped or not, gives back every tensor that we wrote, and tied ones stay one memory."""
    path = scratch / "ours.pth"
    anycard.save(state, path)
    for how in ({}, {"mmap": True}):
        theirs = torch.load(path, weights_only=True, **how)
        assert list(theirs) == list(state)
        assert_same(tensors_of(theirs), tensors_of(state))
        for one, two in itertools.combinations(tensors_of(state), 2):
            if state[one] is state[two] and state[one].numel():
                assert theirs[one].data_ptr() == theirs[two].data_ptr(), (one, two)
    assert_same(anycard.read(path), tensors_of(state))


@many
@given(state=state_dicts(dtypes=SAFETENSORS_DTYPES))
def test_safetensors_reads_what_we_write(scratch, state):
    """The safetensors library gives back every tensor that is no second name of another; we give all."""
    path = scratch / "ours.safetensors"
    anycard.save(state, path)
    theirs = load_file(path)
    assert_same(theirs, {name: tensor for name, tensor in state.items() if name in theirs})
    for name in set(state) - set(theirs):
        assert any(bits(state[name]) == bits(theirs[other]) for other in theirs), name
    assert_same(anycard.read(path), state)


@many
@given(state=state_dicts(plain=True))
def test_the_same_state_gives_the_same_bytes(scratch, state):
    """Two saves of one state under two names, and of a copy of its tensors' memory, are one file."""
    anycard.save(state, scratch / "a.pth")
    anycard.save(state, scratch / "b.pt")
    assert (scratch / "a.pth").read_bytes() == (scratch / "b.pt").read_bytes()


MODELS = st.sampled_from([Nested, OnlyModule])


def fits(kind: type, plan: dict[str, list[str]]) -> dict[str, list[str]]:
    """The part of a plan whose paths this model has."""
    names = dict(kind().named_modules())
    return {path: stack for path, stack in plan.items() if path in names}


@few
@given(kind=MODELS, plan=wrappings(STATELESS), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_any_wrapping_gives_the_bare_models_bytes(scratch, kind, plan, suffix):
    """However the model and its submodules are wrapped, the file is the bare model's, byte for byte."""
    anycard.save(filled(kind()), scratch / f"bare{suffix}")
    anycard.save(wrap_inside(filled(kind()), fits(kind, plan)), scratch / f"wrapped{suffix}")
    assert (scratch / f"wrapped{suffix}").read_bytes() == (scratch / f"bare{suffix}").read_bytes()


@few
@given(kind=MODELS, source=wrappings(), target=wrappings(), plain=st.booleans())
def test_any_wrapping_loads_into_any_other(scratch, kind, source, target, plain):
    """A file of any wrapping, ours or plain torch's, fills any other wrapping with the same bits."""
    model = filled(kind())
    want = weights(model)
    wrapping = wrap_inside(model, fits(kind, source))
    path = scratch / f"{next(COUNT)}.pth"
    if plain:
        torch.save(wrapping.state_dict(), path)
    else:
        anycard.save(wrapping, path)
    other = wrap_inside(filled(kind(), 5), fits(kind, target))
    with quiet():
        anycard.load(path, other)
    anycard.save(other, scratch / "again.pth")
    assert_same(torch.load(scratch / "again.pth", weights_only=True), want)
    path.unlink()


@few
@given(source=wrappings(), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_read_gives_the_bare_models_names(scratch, source, suffix):
    """Without a model too, a file of ours has the bare model's names, whatever was wrapped."""
    model = filled(Nested())
    want = weights(model)
    anycard.save(wrap_inside(model, source), scratch / f"r{suffix}")
    assert_same(anycard.read(scratch / f"r{suffix}"), want)


@pytest.mark.parametrize("scalar", [torch.tensor(1 + 2j).conj(), torch.tensor(1 + 2j).conj().imag], ids=["conj", "neg"])
def test_numpy_of_a_lazily_conjugated_scalar_has_no_dimensions(scratch, scalar):
    """A 0-d tensor with the conjugate or negative bit is a 0-d array."""
    torch.save({"x": scalar}, scratch / "scalar.pth")
    with anycard.open(scratch / "scalar.pth") as ckpt:
        assert ckpt.numpy("x").shape == ()


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_a_signalling_nan_survives_a_lazy_conjugate(scratch, dtype):
    """Conjugates are resolved by sign, not by arithmetic: the other bits of a NaN stay as they are."""
    part = dtype.itemsize // 2
    raw = {2: 0x7D01, 4: 0x7FA00001, 8: 0x7FF4000000000001}[part].to_bytes(part, "little")
    stored = torch.frombuffer(bytearray(raw + raw), dtype=torch.uint8).view(dtype)
    torch.save({"x": stored.conj()}, scratch / "nan.pth")
    anycard.save({"x": stored.conj()}, scratch / "ours.pth")
    want = raw + raw[:-1] + bytes([raw[-1] ^ 0x80])
    assert bits(anycard.read(scratch / "nan.pth")["x"]) == want
    if dtype != torch.complex32:  # torch itself, which resolves it when we save, makes it quiet
        assert bits(anycard.read(scratch / "ours.pth")["x"]) == want


@pytest.mark.parametrize("kind", ["conj", "neg"])
@pytest.mark.parametrize("suffix", [".pth"])
def test_a_lazily_conjugated_view_with_gaps_is_saved_right(scratch, kind, suffix):
    """Transposed, with gaps and a conjugate or negative bit: what torch resolves into another order is saved right."""
    base = torch.arange(24.0).view(3, 4, 2)
    base = torch.view_as_complex(base)
    tensor = base[:, ::2].t().conj() if kind == "conj" else base.conj().imag.t()
    anycard.save({"x": tensor}, scratch / f"gaps{suffix}")
    assert_same_bits(anycard.read(scratch / f"gaps{suffix}")["x"], tensor)


def test_a_tensor_called_as_metadata_says_is_no_tie(scratch):
    """A tensor called `pt` does not bring forth one called `format`, which safetensors' metadata maps to "pt"."""
    state = {"pt": torch.ones(2), "x": torch.zeros(2)}
    anycard.save(state, scratch / "pt.safetensors")
    assert_same(anycard.read(scratch / "pt.safetensors"), state)
    model = torch.nn.ParameterDict(state)
    anycard.save(model, scratch / "pt.safetensors")
    assert_same(weights(anycard.load(scratch / "pt.safetensors", torch.nn.ParameterDict(state))), state)
