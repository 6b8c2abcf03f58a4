"""Tensors that cannot be given plainly: listed with their parts, and why; those of accelerators are plain."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from helpers import quiet


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    with quiet():
        torch.save(value, file)
    file.seek(0)
    return file


def kinds() -> dict[str, tuple[Any, dict[str, Any]]]:
    """A tensor, and its parts."""
    with quiet():
        from torch.testing._internal.two_tensor import TwoTensor

        dense = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]])
        coo, csr, csc = dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()
        value = torch.arange(6.0).reshape(2, 3)
        tensor = torch.quantize_per_tensor(value, 0.5, 3, torch.qint8)
        channel = torch.quantize_per_channel(value, torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), 0, torch.quint8)
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
        jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
        return {
            "coo": (coo, {"indices": coo.indices(), "values": coo.values(), "size": [2, 3]}),
            "csr": (csr, {"crow_indices": csr.crow_indices(), "col_indices": csr.col_indices()}),
            "csc": (csc, {"ccol_indices": csc.ccol_indices(), "row_indices": csc.row_indices()}),
            "per_tensor": (tensor, {"int_repr": tensor.int_repr(), "scale": 0.5, "zero_point": 3}),
            "per_channel": (channel, {"int_repr": channel.int_repr(), "scales": channel.q_per_channel_scales(),
                                      "zero_points": channel.q_per_channel_zero_points(), "axis": 0}),
            "nested": (nested, {"values": nested.values(), "sizes": nested._nested_tensor_size()}),
            "jagged": (jagged, {"_values": jagged.values(), "_offsets": jagged.offsets()}),
            "subclass": (TwoTensor(torch.ones(2), torch.zeros(2)), {"a": torch.ones(2), "b": torch.zeros(2)}),
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "per_tensor", "per_channel", "nested", "jagged", "subclass"])
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


def test_packed_below_a_byte() -> None:
    """Two integers a byte: the storage is listed as it is, and what stands beside is read."""
    with quiet():
        value = torch.quantize_per_channel(torch.rand(2, 8), torch.ones(2), torch.zeros(2), 0, torch.quint4x2)
    with anycard.open(saved({"x": value, "beside": torch.ones(2)})) as ckpt:
        assert len(ckpt.tensors) > 1
        assert ckpt.torch("beside").tolist() == [1, 1]


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
