"""Tensors that cannot be given plainly: listed with their parts, and why; those of accelerators are plain."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import anycard
from helpers import Reduced, assert_same, quiet


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    with quiet():
        torch.save(value, file)
    file.seek(0)
    return file


class Slotted(torch.Tensor):
    """A tensor on meta beside the real one, which stands in a slot."""

    __slots__ = ("elem",)

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Slotted:
        made = torch.Tensor._make_subclass(cls, elem.to("meta"), False)
        made.elem = elem
        return made


class OwnState(Slotted):
    """Pickles its tensor in a tuple of its own making."""

    def __getstate__(self) -> Any:
        return "mark", getattr(self, "elem", None), self.__dict__


def kinds() -> dict[str, tuple[Any, dict[str, Any]]]:
    """A tensor, and its parts."""
    with quiet():
        from torch.testing._internal.two_tensor import TwoTensor

        dense = torch.tensor([[0.0, 2.0, 0.0, 5.0], [3.0, 0.0, 4.0, 0.0]])
        coo, csr, csc = dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()
        bsr, bsc, batch = dense.to_sparse_bsr((1, 2)), dense.to_sparse_bsc((1, 2)), torch.stack([dense, dense])
        twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 4))
        hybrid = torch.sparse_coo_tensor([[0, 1]], torch.ones(2, 3), (2, 3)).coalesce()
        small = torch.sparse_csr_tensor(torch.tensor([0, 1, 2]).int(), torch.tensor([1, 3]).int(), torch.ones(2).half())
        value = torch.arange(6.0).reshape(2, 3)
        tensor = torch.quantize_per_tensor(value, 0.5, 3, torch.qint8)
        wide = torch.quantize_per_tensor(value, 0.5, 3, torch.qint32).t()
        channel = torch.quantize_per_channel(value, torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), 0, torch.quint8)
        floats = torch.quantize_per_channel(value, torch.ones(2), torch.tensor([0.5, 1.5]), 0, torch.quint8)
        packed = torch.quantize_per_channel(torch.rand(2, 8), torch.ones(2), torch.zeros(2), 0, torch.quint4x2)
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
        jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
        masked = torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
        return {
            "coo": (coo, {"indices": coo.indices(), "values": coo.values(), "size": [2, 4], "is_coalesced": True}),
            "coo_twice": (twice, {"indices": twice._indices(), "values": twice._values(), "is_coalesced": False}),
            "coo_hybrid": (hybrid, {"indices": hybrid.indices(), "values": hybrid.values()}),
            "coo_empty": (torch.sparse_coo_tensor(size=(2, 3)), {"values": torch.zeros(0), "size": [2, 3]}),
            "csr": (csr, {"crow_indices": csr.crow_indices(), "col_indices": csr.col_indices()}),
            "csr_int32": (small, {"crow_indices": small.crow_indices(), "values": torch.ones(2).half()}),
            "csr_batch": (batch.to_sparse_csr(), {"col_indices": batch.to_sparse_csr().col_indices()}),
            "csc": (csc, {"ccol_indices": csc.ccol_indices(), "row_indices": csc.row_indices()}),
            "bsr": (bsr, {"crow_indices": bsr.crow_indices(), "values": bsr.values()}),
            "bsc": (bsc, {"ccol_indices": bsc.ccol_indices(), "values": bsc.values()}),
            "per_tensor": (tensor, {"int_repr": tensor.int_repr(), "scale": 0.5, "zero_point": 3}),
            "per_tensor_t": (wide, {"int_repr": wide.int_repr(), "scale": 0.5}),
            "per_channel": (channel, {"int_repr": channel.int_repr(), "scales": channel.q_per_channel_scales(),
                                      "zero_points": channel.q_per_channel_zero_points(), "axis": 0}),
            "float_zero_points": (floats, {"int_repr": floats.int_repr(), "zero_points": torch.tensor([0.5, 1.5])}),
            "packed": (packed, {"packed": torch.tensor(packed.untyped_storage().tolist(), dtype=torch.uint8),
                                "size": [2, 8], "scales": torch.ones(2)}),
            "nested": (nested, {"values": nested.values(), "sizes": nested._nested_tensor_size()}),
            "jagged": (jagged, {"_values": jagged.values(), "_offsets": jagged.offsets()}),
            "subclass": (TwoTensor(torch.ones(2), torch.zeros(2)), {"a": torch.ones(2), "b": torch.zeros(2)}),
            "parameter": (nn.Parameter(TwoTensor(torch.ones(2), torch.zeros(2))), {"a": torch.ones(2)}),
            "slots": (Slotted(torch.arange(3.0)), {"elem": torch.arange(3.0)}),
            "own_state": (OwnState(torch.arange(3.0)), {"0": "mark", "1": torch.arange(3.0)}),
            "masked": (masked, {"_masked_data": torch.ones(2), "_masked_mask": torch.tensor([True, False])}),
        }  # fmt: skip


KINDS = [
    "coo", "coo_twice", "coo_hybrid", "coo_empty", "csr", "csr_int32", "csr_batch", "csc", "bsr", "bsc",
    "per_tensor", "per_tensor_t", "per_channel", "float_zero_points", "packed", "nested", "jagged", "subclass",
    "parameter", "slots", "own_state", "masked",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_parts(kind: str) -> None:
    """Each part has its name and values, what stands beside is read as ever, and the object says why."""
    value, parts = kinds()[kind]
    beside = torch.arange(5.0)
    with anycard.open(saved({"x": value, "beside": beside})) as ckpt:
        why = ckpt.objects["x"]["why"]
        assert "given by" in why
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                assert torch.equal(ckpt.torch(f"x.{name}"), part), name
            else:
                assert ckpt.objects["x"][name] == part
    got = anycard.read(saved({"x": value, "beside": beside}))
    assert torch.equal(got["beside"], beside)
    assert {f"x.{n}" for n, p in parts.items() if isinstance(p, torch.Tensor)} <= set(got)


def test_in_a_whole_model() -> None:
    """A module with a quantised buffer gives its plain weights, and the parts of the others."""
    model = nn.Linear(2, 3)
    value = kinds()["per_tensor"][0]
    model.register_buffer("packed", value)
    got = anycard.read(saved(model))
    assert set(got) == {"weight", "bias", "packed.int_repr"}
    assert torch.equal(got["packed.int_repr"], value.int_repr())


def test_an_attribute_of_a_tensor_and_a_plain_subclass() -> None:
    """They are plain."""

    got = anycard.read(saved({"w": Tagged(torch.arange(3.0))}))
    assert torch.equal(got["w"], torch.arange(3.0)) and type(got["w"]) is torch.Tensor


class Tagged(torch.Tensor):
    """A subclass without more memory."""

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Tagged:
        made = torch.Tensor._make_subclass(cls, value)
        made.note = "x"
        return made


class Elsewhere:
    """Pickles as a tensor of an accelerator whose tensors have no storages."""

    def __init__(self, how: str, data: Any, dtype: torch.dtype) -> None:
        self.call = getattr(torch._utils, how), (data, dtype, "xla:0", True)

    def __reduce__(self) -> Any:
        return self.call


def test_tensors_of_accelerators_without_storages() -> None:
    """From an array or a CPU tensor: plain tensors with the device's tag; of another dtype: their parts."""
    array, tensor = np.arange(6, dtype=np.float32), torch.arange(4.0)
    held = {
        "a": Elsewhere("_rebuild_device_tensor_from_numpy", array, torch.float32),
        "b": Elsewhere("_rebuild_device_tensor_from_cpu_tensor", tensor, torch.float32),
        "c": Elsewhere("_rebuild_xla_tensor", array, torch.float32),
        "d": Elsewhere("_rebuild_device_tensor_from_numpy", array, torch.bfloat16),
    }
    with anycard.open(saved(held)) as ckpt:
        assert {ckpt.tensors[name].device for name in "abc"} == {"xla:0"}
        assert "another dtype" in ckpt.objects["d"]["why"]
    got = anycard.read(saved(held))
    assert torch.equal(got["a"], torch.from_numpy(array)) and torch.equal(got["b"], tensor)
    assert torch.equal(got["c"], got["a"])


def test_a_quantised_claim_that_does_not_fit() -> None:
    """Integers outside of the storage are refused."""
    file = saved({"x": kinds()["per_tensor"][0]})
    changed = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(changed, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                assert data.count(b"K\x02K\x03\x86") == 1
                data = data.replace(b"K\x02K\x03\x86", b"K\x07K\x03\x86")
            target.writestr(info.filename, data)
    changed.seek(0)
    with pytest.raises(anycard.FormatError, match="needs 2"):
        anycard.open(changed)


class Named(torch.Tensor):
    """A subclass without anything of its own."""


@pytest.mark.parametrize("module", ["torch._tensor", "torch.tensor"])
@pytest.mark.parametrize("function", ["_rebuild_from_type", "_rebuild_from_type_v2"])
def test_subclasses_as_older_torch_spelt_them(module: str, function: str, tmp_path: Path) -> None:
    """By one function or the other, in the module's old name or today's: the plain tensor."""
    held = torch.arange(10.0)[4:6]
    make, args = held._reduce_ex_internal(2)
    spelt = Reduced(torch._tensor._rebuild_from_type, (make, Named, args, {}))
    with (
        zipfile.ZipFile(saved({"w": spelt, "b": torch.ones(3)})) as old,
        zipfile.ZipFile(tmp_path / "x.pt", "w") as new,
    ):
        for name in old.namelist():
            data = old.read(name).replace(b"torch._tensor\n_rebuild_from_type\n", f"{module}\n{function}\n".encode())
            new.writestr(name, data)
    assert_same(anycard.read(tmp_path / "x.pt"), {"w": held, "b": torch.ones(3)})


# TorchScript.


class Holds(nn.Module):
    """A buffer of any kind."""

    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("held", held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def composed() -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    with quiet():
        dense = torch.tensor([[0.0, 2.0, 0.0, 5.0], [3.0, 0.0, 4.0, 0.0]])
        coo, csr = dense.to_sparse().coalesce(), dense.to_sparse_csr()
        tensor = torch.quantize_per_tensor(dense, 0.5, 3, torch.qint8)
        channel = torch.quantize_per_channel(dense, torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), 0, torch.quint8)
    return {
        "coo": (coo, {"indices": coo.indices(), "values": coo.values()}),
        "csr": (csr, {"crow_indices": csr.crow_indices(), "col_indices": csr.col_indices(), "values": csr.values()}),
        "per tensor": (tensor, {"int_repr": tensor.int_repr()}),
        "per channel": (channel, {"int_repr": channel.int_repr(), "scales": channel.q_per_channel_scales(),
                                  "zero_points": channel.q_per_channel_zero_points()}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["coo", "csr", "per tensor", "per channel"])
def test_torchscript_lists_tensors_by_their_parts(kind: str, tmp_path: Path) -> None:
    """What is no plain tensor is none that vanishes."""
    held, parts = composed()[kind]
    with quiet():
        torch.jit.save(torch.jit.script(Holds(held)), tmp_path / "x.pt")
    assert_same(anycard.read(tmp_path / "x.pt"), {f"held.{name}": part for name, part in parts.items()})
    with anycard.open(tmp_path / "x.pt") as ckpt:
        assert "given by" in ckpt.objects["held"]["why"]


DTYPES = (
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "complex32", "bits8", "float4_e2m1fn_x2",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchscript_dtypes(dtype: str, tmp_path: Path) -> None:
    """TorchScript names a storage class for each dtype, also where Python's torch has none."""
    kind = getattr(torch, dtype, None)
    if kind is None:
        pytest.skip("a torch without it")
    with quiet():
        held = torch.arange(16, dtype=torch.uint8).view(kind)
        torch.jit.save(torch.jit.script(Holds(held)), tmp_path / "x.pt")
    assert_same(anycard.read(tmp_path / "x.pt"), {"held": held})


@pytest.mark.parametrize("how", ["script", "whole"])
def test_packed_parameters(how: str, tmp_path: Path) -> None:
    """A dynamically quantised model: the same names as in its state dict, whichever way it was saved."""
    with quiet():
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {nn.Linear})
        save = torch.save if how == "whole" else lambda m, path: torch.jit.save(torch.jit.script(m), path)
        save(model, tmp_path / "x.pt")
        torch.save(model.state_dict(), tmp_path / "plain.pt")
        want = anycard.read(tmp_path / "plain.pt")
    assert_same(anycard.read(tmp_path / "x.pt"), {name: t for name, t in want.items() if "_packed_params." in name})


@pytest.mark.parametrize("how", ["script", "whole"])
def test_quantised_convolutions(how: str, tmp_path: Path) -> None:
    """A statically quantised model, whose convolutions pickle themselves as tuples: the names of its state dict."""
    with quiet():
        torch.backends.quantized.engine, tq = "fbgemm", torch.ao.quantization
        model = nn.Sequential(tq.QuantStub(), nn.Conv2d(1, 2, 3)).eval()
        model.qconfig = tq.get_default_qconfig("fbgemm")  # type: ignore[assignment]
        tq.prepare(model, inplace=True)(torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4))
        model = tq.convert(model)
        save = torch.save if how == "whole" else lambda m, path: torch.jit.save(torch.jit.script(m), path)
        save(model, tmp_path / "x.pt")
        torch.save(model.state_dict(), tmp_path / "plain.pt")
        want = anycard.read(tmp_path / "plain.pt")
    assert_same(
        anycard.read(tmp_path / "x.pt"), {n: t for n, t in want.items() if n not in ("1.scale", "1.zero_point")}
    )
    assert anycard.open(tmp_path / "x.pt").objects["1.zero_point"] == int(want["1.zero_point"])


def test_a_model_without_tensors_is_said(tmp_path: Path) -> None:
    """Nothing is read, and not in silence."""
    with quiet():
        torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="no tensors"):
        assert anycard.read(tmp_path / "x.pt") == {}


# safetensors.


@pytest.mark.parametrize("shape", [(8,), (3, 4), (0,), (2, 0)])
def test_two_numbers_to_a_byte(shape: tuple[int, ...], tmp_path: Path) -> None:
    """The header counts them one by one, torch by twos: what its own library reads."""
    kind = getattr(torch, "float4_e2m1fn_x2", None)
    if kind is None:
        pytest.skip("a torch without it")
    held = torch.randint(256, shape, dtype=torch.uint8).view(kind)
    save_file({"x": held, "y": torch.ones(3)}, tmp_path / "x.safetensors")
    assert_same(anycard.read(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors"))
    assert_same(anycard.read(tmp_path / "x.safetensors"), {"x": held, "y": torch.ones(3)})


def test_metadata_that_is_null(tmp_path: Path) -> None:
    """The library takes it for none."""
    text = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\x80?")
    assert_same(anycard.read(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors"))


# Views.


def test_views_that_are_far_more_than_what_is_stored(tmp_path: Path) -> None:
    """Each within its bound, all together beyond it: refused before memory is taken; one alone is made."""
    one = torch.ones(1)
    torch.save({f"t{number}": one.expand((1 << 28) - number) for number in range(3)}, tmp_path / "x.pt")
    with pytest.raises(anycard.FormatError, match="claimed from 4 stored"):
        anycard.read(tmp_path / "x.pt")
    few = {"a": one.expand(1000), "b": one.expand(1001), "tied": one}
    torch.save(few, tmp_path / "y.pt")
    assert_same(anycard.read(tmp_path / "y.pt"), few)
