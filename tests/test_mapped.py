"""`mmap=True`: the same model, over the file's own pages, and the file stays as it is."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import anycard


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 50, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.table(x)))


def mapped_from(tensor: torch.Tensor, path: Path) -> bool:
    """The tensor's memory is a mapping of this file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(path))
    return False


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)


def write(model: nn.Module, path: Path, how: str) -> None:
    if how == "legacy stream":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    elif how == "safetensors at odd places":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file({"odd": torch.zeros(3, dtype=torch.uint8), **state}, path)
    else:
        anycard.save(model, path)
        if how == "deflated":
            deflated(path)


@pytest.mark.parametrize(
    ("how", "name", "maps"),
    [
        ("torch zip", "a.pth", True),
        ("safetensors", "a.safetensors", True),
        ("legacy stream", "a.pt", None),
        ("deflated", "a.pth", False),
        ("safetensors at odd places", "a.safetensors", None),
    ],
)
@pytest.mark.parametrize("target", ["factory", "model", "meta"])
@pytest.mark.filterwarnings("ignore:.*loaded without")
def test_same_values_whatever_is_mapped(tmp_path: Path, how: str, name: str, maps: bool | None, target: str) -> None:
    torch.manual_seed(1)
    source, path = Tied(), tmp_path / name
    write(source, path, how)
    before = path.read_bytes()
    if target == "meta":
        with torch.device("meta"):
            given = Tied()
    else:
        given = Tied if target == "factory" else Tied()
    model = anycard.load(path, given, mmap=True, strict=how != "safetensors at odd places", device="cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert model.out.weight is model.table.weight
    if maps is not None:
        assert mapped_from(model.table.weight, path) is maps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(10)).sum().backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert not torch.equal(model.table.weight, source.table.weight)


def test_the_model_outlives_the_file(tmp_path: Path) -> None:
    source, path = Tied(), tmp_path / "a.pth"
    anycard.save(source, path)
    model = anycard.load(path, Tied, mmap=True)
    anycard.save(Tied(), path)
    path.unlink()
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, "auto"])
def test_another_dtype_is_read_and_cast(tmp_path: Path, dtype: torch.dtype | str) -> None:
    source, path = nn.Linear(4, 4), tmp_path / "a.safetensors"
    anycard.save(source, path)
    model = anycard.load(path, lambda: nn.Linear(4, 4), mmap=True, dtype=dtype)
    assert torch.equal(model.weight, source.weight.to(model.weight.dtype))
    assert mapped_from(model.weight, path) is (dtype == "auto")


def test_an_open_file_is_read(tmp_path: Path) -> None:
    source, file = nn.Linear(4, 4), io.BytesIO()
    anycard.save(source, file)
    file.seek(0)
    assert torch.equal(anycard.load(file, lambda: nn.Linear(4, 4), mmap=True).weight, source.weight)


def test_what_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    anycard.save(nn.Linear(4, 5), tmp_path / "a.pth")
    model = nn.Linear(4, 4)
    before = model.weight.data_ptr()
    with pytest.raises(anycard.MismatchError, match=re.escape("weight")):
        anycard.load(tmp_path / "a.pth", model, mmap=True)
    assert model.weight.data_ptr() == before


class Two(nn.Module):
    """Two weights of one shape, which may be one."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        if tied:
            self.b.weight = self.a.weight


def overlapping() -> dict[str, torch.Tensor]:
    """Two views of one storage that share half of their bytes; one inside the first, and one after the second."""
    long = torch.arange(24.0 * 8).view(24, 8)
    return {"a.weight": long[4:12], "b.weight": long[8:16], "c": long[5:6], "d": long[16:]}


@pytest.mark.parametrize("stored", ["tied", "overlapping"])
@pytest.mark.parametrize("target", ["factory", "model", "meta"])
def test_what_the_model_keeps_apart_stays_apart(tmp_path: Path, stored: str, target: str) -> None:
    """Of tensors that share bytes in the file one is mapped; a change of one does not reach another."""

    class Apart(Two):
        def __init__(self) -> None:
            super().__init__()
            if stored == "overlapping":
                self.c = nn.Parameter(torch.zeros(1, 8))
                self.d = nn.Parameter(torch.zeros(8, 8))

    path = tmp_path / "a.pt"
    state = Two(tied=True).state_dict() if stored == "tied" else overlapping()
    torch.save(state, path)
    if target == "meta":
        with torch.device("meta"):
            given = Apart()
    else:
        given = Apart if target == "factory" else Apart()
    model = anycard.load(path, given, mmap=True, device="cpu")
    mapped = {name for name, parameter in model.named_parameters() if mapped_from(parameter, path)}
    assert mapped == ({"a.weight"} if stored == "tied" else {"c", "d", "b.weight"})  # the first come, the first served
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name])
        with torch.no_grad():
            parameter.fill_(-1)
        for other, values in model.named_parameters():
            assert (values is parameter) or torch.equal(values, state[other]), (name, other)
        with torch.no_grad():
            parameter.copy_(state[name])


@pytest.mark.parametrize("given", [{"mmap": True}, {"dtype": torch.float64}, {"mmap": True, "device": "cpu"}, {}])
@pytest.mark.parametrize("tied", [False, True])
def test_a_backward_through_the_old_values_is_refused(tmp_path: Path, given: dict[str, object], tied: bool) -> None:
    """Whatever way an existing model's parameters change, autograd knows, as after load_state_dict."""
    path = tmp_path / "a.pth"
    anycard.save(Two(tied), path)
    model = Two(tied)
    x = torch.ones(1, 8, requires_grad=True)
    loss = model.b(model.a(x)).sum()
    anycard.load(path, model, **given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.b(model.a(x.to(model.a.weight.dtype))).sum().backward()


@pytest.mark.parametrize("given", [{"mmap": True}, {"dtype": torch.float64}])
def test_a_model_made_in_inference_mode_loads(tmp_path: Path, given: dict[str, object]) -> None:
    """Its parameters have no versions."""
    source, path = Two(), tmp_path / "a.pth"
    anycard.save(source, path)
    with torch.inference_mode():
        model = Two()
        anycard.load(path, model, **given)
        assert torch.equal(model.a.weight, source.a.weight.to(model.a.weight.dtype))
    anycard.load(path, model, **given)
    assert torch.equal(model.b.weight, source.b.weight.to(model.b.weight.dtype))
