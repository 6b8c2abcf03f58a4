"""TorchScript, torch packages and exported programs: weights and tree, made by real torch, without running a line."""

from __future__ import annotations

import contextlib
import io
import json
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.package import PackageExporter

import anycard
from anycard.names.module_tree import tree_lines
from helpers import assert_same, bits, filled, quiet, weights


class Net(nn.Module):
    """Parameters, buffers of both kinds, a tied weight, a list and a dict of modules."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.again = nn.Linear(4, 5, bias=False)
        self.again.weight = self.fc.weight
        self.blocks = nn.ModuleList([nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 1, 1)])
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("seen", torch.zeros(5))
        self.register_buffer("hidden", torch.full((5,), 2.0), persistent=False)
        self.register_buffer("counter", torch.tensor(3))
        self.constant = torch.full((5,), 7.0)
        filled(self, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x) + self.again(x) + self.seen + self.hidden + self.constant
        z = y.unsqueeze(1)
        for block in self.blocks:
            z = block(z)
        return z.squeeze(1) * self.scale + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def tree(path: Path) -> str:
    with anycard.open(path) as ckpt:
        return "\n".join(tree_lines(ckpt.tree))


def damaged(path: Path, step: int) -> None:
    """Cut short or changed anywhere: an error of ours, or something else that reads."""
    whole = path.read_bytes()
    for at in range(0, len(whole), step):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            with contextlib.suppress(anycard.CheckpointError), anycard.open(io.BytesIO(data)) as ckpt:
                for name in ckpt.tensors:
                    ckpt.numpy(name, raw=True)


def script(model: nn.Module, how: str) -> Any:
    with quiet():
        return torch.jit.script(model) if how == "script" else torch.jit.trace(model.eval(), torch.rand(2, 4))


# TorchScript.


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(how: str, tmp_path: Path) -> None:
    """The names and values of the scripted module's own state dict; converted, verified, loaded into a model."""
    path = tmp_path / "x.pt"
    scripted = script(Net(), how)
    with quiet():
        torch.jit.save(scripted, path)
        want = weights(torch.jit.load(path))
    assert_same(anycard.read(path), want)
    with anycard.open(path) as ckpt:
        assert ckpt.format == "TorchScript"
        beside = set(ckpt.tensors) - set(want)
        assert "constant" in ckpt.tensors if how == "script" else any(name.startswith("CONSTANTS.") for name in beside)
        assert ckpt.weights()["scale"].parameter and not ckpt.weights()["seen"].parameter
        assert ckpt.weights()["fc.weight"].place == ckpt.weights()["again.weight"].place
    assert anycard.verify(path).ok
    anycard.convert(path, tmp_path / "y.safetensors")
    assert anycard.diff(path, tmp_path / "y.safetensors").equal
    model = anycard.load(path, Net(1), strict=False) if "hidden" in want else anycard.load(path, Net(1))
    assert all(bits(model.state_dict()[name]) == bits(want[name]) for name in model.state_dict())
    with pytest.raises(anycard.CheckpointError, match="code is not run"):
        anycard.load(path)


def test_torchscript_tree(tmp_path: Path) -> None:
    """Class names and the constants of the scripted classes."""
    path = tmp_path / "x.pt"
    with quiet():
        torch.jit.save(torch.jit.script(torchvision.models.resnet18(num_classes=10)), path)
    lines = tree(path)
    assert lines.startswith("ResNet(") and "(0): BasicBlock(" in lines
    assert "kernel_size=(7, 7)" in lines and "padding_mode='zeros'" in lines and "eps=1e-05" in lines


def test_torchscript_resnet(tmp_path: Path) -> None:
    """A real model, by script and by trace, into a model of Python."""
    model = filled(torchvision.models.resnet18(num_classes=10)).eval()
    for number, scripted in enumerate((torch.jit.script(model), torch.jit.trace(model, torch.zeros(1, 3, 32, 32)))):
        with quiet():
            torch.jit.save(scripted, tmp_path / f"{number}.pt")
        assert_same(anycard.read(tmp_path / f"{number}.pt"), weights(model))
        loaded = anycard.load(tmp_path / f"{number}.pt", lambda: torchvision.models.resnet18(num_classes=10))
        assert_same(weights(loaded), weights(model))


def test_torchscript_without_names_of_buffers(tmp_path: Path) -> None:
    """Files of a torch that wrote no `__buffers__`: what is no parameter is a buffer."""
    path = tmp_path / "x.pt"
    with quiet():
        torch.jit.save(script(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), "script"), path)
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for info in source.infolist():
            lines = source.read(info).split(b"\n")
            keep = [x for x in lines if not x.startswith(b"  __buffers__")] if info.filename.endswith(".py") else lines
            target.writestr(info.filename, b"\n".join(keep))
    assert set(anycard.read(old)) == set(anycard.read(path)) != set()


def test_torchscript_damaged(tmp_path: Path) -> None:
    """Fuzzed by position."""
    with quiet():
        torch.jit.save(script(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), "script"), tmp_path / "x.pt")
    damaged(tmp_path / "x.pt", 41)


# torch.package.


def packaged(path: Path, **objects: Any) -> None:
    with quiet(), PackageExporter(path) as exporter:
        exporter.extern(["torch.**", "torchvision.**"])
        exporter.mock("**")
        exporter.save_text("notes", "readme.txt", "no pickle")
        exporter.save_binary("notes", "raw", b"\x80\x02 no pickle either")
        for name, value in objects.items():
            exporter.save_pickle(name, f"{name}.pkl", value)


def test_package(tmp_path: Path) -> None:
    """A model in a package is the file's object."""
    path, model = tmp_path / "x.pt", filled(torchvision.models.resnet18(num_classes=10))
    packaged(path, model=model)
    assert_same(anycard.read(path), weights(model))
    with anycard.open(path) as ckpt:
        assert (ckpt.format, ckpt.metadata) == ("torch package", {"pickles": ["model/model.pkl"]})
    assert "Conv2d(in_channels=3, out_channels=64" in tree(path)
    assert anycard.verify(path).ok
    loaded = anycard.load(path, lambda: torchvision.models.resnet18(num_classes=10))
    assert_same(weights(loaded), weights(model))


def test_package_of_several(tmp_path: Path) -> None:
    """Several pickles: by their paths; a key picks."""
    path, one, two = tmp_path / "x.pt", filled(nn.Linear(2, 3)), filled(nn.Linear(3, 4), 1)
    packaged(path, one=one, two=two.state_dict())
    with anycard.open(path) as ckpt:
        keys = [held.key for held in ckpt.state_dicts]
    assert keys == ["one/one.pkl", "two/two.pkl"]
    assert_same(anycard.read(path, key=keys[0]), weights(one))
    assert_same(anycard.read(path, key=keys[1]), weights(two))


def test_package_with_a_script_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script module within a package keeps its storages there."""
    monkeypatch.setattr(torch.package.package_exporter, "_gate_torchscript_serialization", False)
    path, scripted = tmp_path / "x.pt", script(Net(), "script")
    packaged(path, model={"net": scripted, "note": "x"})
    assert_same(anycard.read(path), weights(scripted))


def test_package_damaged(tmp_path: Path) -> None:
    """Fuzzed by position."""
    packaged(tmp_path / "x.pt", model=nn.Linear(2, 3))
    damaged(tmp_path / "x.pt", 41)


# torch.export.


def exported(model: nn.Module) -> Any:
    with quiet():
        return torch.export.export(model, (torch.ones(2, 4),))


def test_export(tmp_path: Path) -> None:
    """The program's state dict; constants are listed beside it."""
    path, program = tmp_path / "x.pt2", exported(Net())
    with quiet():
        torch.export.save(program, path)
    want = dict(program.state_dict)
    assert_same(anycard.read(path), want)
    with anycard.open(path) as ckpt:
        assert ckpt.format == "torch export"
        assert {f"constants.{name}" for name in program.constants} <= set(ckpt.tensors)
        assert ckpt.weights()["scale"].parameter and not ckpt.weights()["seen"].parameter
        assert ckpt.weights()["fc.weight"].place == ckpt.weights()["again.weight"].place
    assert anycard.verify(path).ok
    assert_same(anycard.load(path, Net(1)).state_dict(), want)
    assert "ExportedProgram" in tree(path)
    anycard.convert(path, tmp_path / "y.pt")
    assert_same(anycard.read(tmp_path / "y.pt"), want)


def test_export_of_programs_by_other_names(tmp_path: Path) -> None:
    """One program is the weights, whatever it is called; of several, key= picks."""
    from torch.export.pt2_archive._package import package_pt2

    one, two = filled(nn.Linear(4, 2), 1), filled(nn.Linear(4, 2), 2)
    package_pt2(tmp_path / "one.pt2", exported_programs={"encoder": exported(one)})
    package_pt2(tmp_path / "two.pt2", exported_programs={"encoder": exported(one), "head": exported(two)})
    assert_same(anycard.read(tmp_path / "one.pt2"), weights(one))
    assert_same(anycard.read(tmp_path / "two.pt2", key="head"), weights(two))
    with pytest.raises(anycard.CheckpointError, match=r"'encoder'.*'head'"):
        anycard.read(tmp_path / "two.pt2")


@pytest.mark.parametrize("name", ["\u0130stanbul.pt2", "\u212a.pt2", "\u00c4\u00c4.PT2"])
def test_export_below_a_folder_of_any_letters(tmp_path: Path, name: str) -> None:
    """Letters that have another length in lower case; torch calls the folder like the file."""
    torch.export.save(exported(nn.Linear(4, 2)), tmp_path / name)
    assert set(anycard.read(tmp_path / name)) == {"weight", "bias"}


def old_export(path: Path, model: nn.Module, method: int = zipfile.ZIP_STORED) -> None:
    """An exported program as torch 2.6 to 2.8 wrote it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        for name, value in (("state_dict", model.state_dict()), ("constants", {"c": torch.arange(9.0)})):
            file = io.BytesIO()
            torch.save(value, file)
            archive.writestr(f"serialized_{name}.pt", file.getvalue())
        archive.writestr("version", "7.1")


def test_export_of_2_6_to_2_8(tmp_path: Path) -> None:
    """`serialized_state_dict.pt` is a torch file within the archive, stored or deflated."""
    model = Net()
    for number, method in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
        path = tmp_path / f"{number}.pt2"
        old_export(path, model, method)
        assert_same(anycard.read(path), weights(model))
        with anycard.open(path) as ckpt:
            assert ckpt.numpy("constants.c").tolist() == list(range(9))
            offset = ckpt.tensors["scale"].offset
            assert (offset is None) is (method == zipfile.ZIP_DEFLATED)
            assert offset is None or path.read_bytes()[offset:][:20] == model.scale.detach().numpy().tobytes()
        assert anycard.verify(path).ok


def test_export_with_pickled_weights(tmp_path: Path) -> None:
    """An entry with `use_pickle` is a torch file of one tensor; a claim that does not fit is refused."""
    path, changed = tmp_path / "x.pt2", tmp_path / "y.pt2"
    program = exported(Net())
    with quiet():
        torch.export.save(program, path)
    file = io.BytesIO()
    torch.save(nn.Parameter(torch.arange(5.0)), file)

    def rewritten(change: Any) -> None:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
            config = json.loads(source.read("x/data/weights/model_weights_config.json"))
            config["config"]["scale"] |= change
            for info in source.infolist():
                data = source.read(info)
                if info.filename.endswith("model_weights_config.json"):
                    data = json.dumps(config).encode()
                target.writestr(info.filename, data)
            target.writestr("x/data/weights/pickled", file.getvalue())

    rewritten({"use_pickle": True, "path_name": "pickled"})
    assert torch.equal(anycard.read(changed)["scale"], torch.arange(5.0))
    meta = json.loads(zipfile.ZipFile(path).read("x/data/weights/model_weights_config.json"))["config"]["scale"]
    for bad in (
        {"path_name": "absent"}, {"path_name": 3}, {"tensor_meta": None, "path_name": "gone"},
        {"tensor_meta": meta["tensor_meta"] | {"sizes": [{"as_int": 6}]}},
        {"tensor_meta": meta["tensor_meta"] | {"sizes": [{"as_int": -1}]}},
        {"tensor_meta": meta["tensor_meta"] | {"strides": [{"as_expr": 6}]}},
        {"tensor_meta": meta["tensor_meta"] | {"storage_offset": {"as_int": 1 << 70}}},
        {"tensor_meta": meta["tensor_meta"] | {"dtype": 99}}, {"tensor_meta": meta["tensor_meta"] | {"dtype": []}},
    ):  # fmt: skip
        rewritten(bad)
        with pytest.raises(anycard.FormatError) as caught:
            anycard.open(changed)
        assert caught.value.offset is not None


@pytest.mark.parametrize("lie", ["a number", "pickled", "old"])
def test_export_that_lies(lie: str, tmp_path: Path) -> None:
    """A device whose number is none; archives within it that are no torch files: an error that says so."""
    inner, number = io.BytesIO(), "1e999" if lie == "a number" else "null"
    with zipfile.ZipFile(inner, "w") as held:
        held.writestr("archive/data/weights/model_weights_config.json", "{}")
    meta: dict[str, Any] = {
        "dtype": 7, "sizes": [{"as_int": 1}], "requires_grad": False, "device": {"type": "cuda", "index": None},
        "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7,
    }  # fmt: skip
    entry = {"path_name": "w0", "is_param": True, "use_pickle": lie == "pickled", "tensor_meta": meta}
    config = json.dumps({"config": {"w": entry}}).replace('"index": null', f'"index": {number}')
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as held:
        if lie == "old":
            held.writestr("serialized_state_dict.pt", inner.getvalue())
        else:
            held.writestr("x/data/weights/model_weights_config.json", config)
            held.writestr("x/data/weights/w0", inner.getvalue() if lie == "pickled" else b"\0\0\x80?")
    with pytest.raises(anycard.FormatError, match="does not describe tensors" if lie == "a number" else r"data\.pkl"):
        anycard.read(tmp_path / "x.pt2")


def test_export_damaged(tmp_path: Path) -> None:
    """Fuzzed by position."""
    with quiet():
        torch.export.save(exported(nn.Linear(4, 2)), tmp_path / "x.pt2")
    damaged(tmp_path / "x.pt2", 83)


# Bombs: what is small in the file and would be large in memory.


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("code/__torch__/x.py", b"\n" * (60 << 20)),
        ("constants.pkl", b"]" * (60 << 20)),
        ("data/weights/model_weights_config.json", b"[" * (60 << 20)),
        ("data/weights/model_weights_config.json", b'{"config": {' + b'"a":[],' * (8 << 20)),
        ("serialized_state_dict.pt", b"PK\x03\x04" * (15 << 20)),
        ("model/model.pkl", b"\x80\x02" + b"]" * (60 << 20)),
    ],
)
def test_bombs(name: str, data: bytes, tmp_path: Path) -> None:
    """Refused within a second, without the memory that it asks for."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if name.endswith("_config.json") or name.startswith("serialized"):
            archive.writestr("x/" + name if "/" in name else name, data)
        elif name.startswith("model/"):
            archive.writestr("x/.data/extern_modules", "")
            archive.writestr("x/" + name, data)
        else:
            archive.writestr("x/data.pkl", b"\x80\x02c__torch__.x\nNet\n)\x81}X\x01\0\0\0aK\x01sb.")
            archive.writestr("x/constants.pkl", data if name == "constants.pkl" else b"\x80\x02).")
            if name != "constants.pkl":
                archive.writestr("x/" + name, data)
    tracemalloc.start()
    try:
        began = time.process_time()
        with pytest.raises(anycard.FormatError):
            anycard.open(path)
        assert time.process_time() - began < 2
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
