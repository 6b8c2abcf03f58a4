"""PyTorch 1.13: what it wrote reads right here, and what anycard writes loads there by plain `torch.load`.

`old_torch/files` were written by a real 1.13 (`old_torch/make.py`). The other way round needs one: set
`ANYCARD_OLD_PYTHON` to an interpreter that has it; else `/usr/bin/python3` is tried (Debian 12's package
`python3-torch` puts 1.13 there).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import anycard
from old_torch.load import describe, entries
from old_torch.make import Net

HERE = Path(__file__).parent / "old_torch"
FILES = HERE / "files"
TRUTH: dict[str, dict[str, list[Any]]] = json.loads((FILES / "truth.json").read_text("utf-8"))["files"]
READ = sorted(TRUTH)
# In a whole model, `tensors` has non-persistent buffers and tensors kept as attributes too.
BESIDE = {"scratch", "norm.weight"}
OF_NET = [n for n in READ if n.startswith(("weights", "whole", "training", "forgotten")) and "shuffle" not in n]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def facts(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: describe(tensor) for name, tensor in tensors.items()}


def of_model(name: str) -> dict[str, list[Any]]:
    """The truth of the model in a file, under the model's own names."""
    prefix = "model.module." if name.startswith("training") else "module." if "parallel" in name else ""
    return {key.removeprefix(prefix): row for key, row in TRUTH[name].items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", READ)
def test_tensors(name: str) -> None:
    """Every tensor that the old PyTorch wrote, by stored name: dtype, shape, bytes."""
    with anycard.open(FILES / name) as ckpt:
        formats = {"legacy": "legacy stream", "plain": "plain pickle", "zip": "torch zip"}
        assert ckpt.format == formats[name.split(".")[-2]]
        got = {
            key: [info.dtype, list(info.shape), hashlib.sha256(ckpt.numpy(key, raw=True).tobytes()).hexdigest()]
            for key, info in ckpt.tensors.items()
        }
    beside = {key for key in got.keys() - TRUTH[name].keys() if key.removeprefix("module.") in BESIDE}
    assert not beside or name.startswith(("whole", "forgotten"))
    assert {key: row for key, row in got.items() if key not in beside} == TRUTH[name]


@pytest.mark.parametrize("name", READ)
def test_read_without_classes(name: str) -> None:
    """`read` gives the weights under canonical names; `Net` does not exist where a file says it was."""
    assert not hasattr(sys.modules["__main__"], "Net")
    want = of_model(name)
    guessed = name.startswith(("weights_parallel", "training"))  # no class says whose prefix `module.` is
    with pytest.warns(UserWarning, match=r"'module\.'") if guessed else nullcontext():
        assert facts(anycard.read(FILES / name)) == want
    with anycard.open(FILES / name) as ckpt:
        assert {key: [info.dtype, list(info.shape)] for key, info in ckpt.weights().items()} == {
            key: row[:2] for key, row in want.items()
        }
        assert bool(ckpt.wrappers) == ("parallel" in name or name.startswith("training"))


@pytest.mark.parametrize("wrapped", [False, True], ids=["single", "parallel"])
@pytest.mark.parametrize("name", OF_NET)
def test_load_into_models(name: str, wrapped: bool) -> None:
    """Weights, whole models, training checkpoints, the forgotten call: into a factory and an existing model."""
    assert facts(anycard.load(FILES / name, Net).state_dict()) == of_model(name)
    model = nn.DataParallel(Net()) if wrapped else Net()
    inner = model.module if wrapped else model
    held = dict(inner.named_parameters())
    loaded = anycard.load(FILES / name, model)
    assert loaded is model
    assert facts(inner.state_dict()) == of_model(name)
    assert all(held[key] is parameter for key, parameter in inner.named_parameters())
    assert inner.tied_in.weight is inner.tied_out.weight
    assert inner.scratch.tolist() == [[0, 1, 2], [3, 4, 5]]
    with torch.no_grad():
        inner.norm(torch.ones(1, 4))  # weight norm computes its weight from what was loaded
    assert torch.equal(inner.norm.weight, torch._weight_norm(inner.norm.weight_v, inner.norm.weight_g, 0))


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_training_checkpoint(form: str) -> None:
    """Model and optimizer are filled, the rest is given back."""
    model = nn.DataParallel(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    name = f"training.{form}.pth"
    rest = anycard.load(FILES / name, {"model": model, "optimizer": optimizer})
    assert (rest["epoch"], rest["best"]) == (3, 0.5)
    assert facts(model.module.state_dict()) == of_model(name)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == 1e-3
    want = {key: row for key, row in TRUTH[name].items() if key.startswith("optimizer.")}
    assert facts(dict(entries(state, "optimizer"))) == want


def test_whole_model_of_allowed_classes() -> None:
    """A whole model of a torchvision block, rebuilt by today's classes: same bits, and it computes."""
    name = "whole_shuffle_block.zip.pth"
    with pytest.raises(anycard.UntrustedError) as caught:
        anycard.load(FILES / name)
    assert caught.value.needed == ("torchvision.models.shufflenetv2.InvertedResidual",)
    block = anycard.load(FILES / name, allow=list(caught.value.needed))
    assert type(block) is torchvision.models.shufflenetv2.InvertedResidual
    assert facts(block.state_dict()) == TRUTH[name]
    fresh = anycard.load(FILES / name, lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=2).stage2[0])
    given = torch.ones(1, 24, 8, 8)
    with torch.no_grad():
        assert torch.equal(block.eval()(given), fresh.eval()(given))


@pytest.mark.parametrize("name", ["whole.zip.pth", "whole_parallel.zip.pth", "forgotten_call.zip.pth"])
def test_whole_model_of_main(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of the script's own: rebuilt where it is there and allowed, out of its wrapper."""
    here = type("Net", (Net,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Net", here, raising=False)
    with pytest.raises(anycard.UntrustedError, match=r"__main__\.Net") as caught:
        anycard.load(FILES / name)
    assert caught.value.needed == ("__main__.Net",)
    model = anycard.load(FILES / name, allow=caught.value.needed)
    assert type(model) is here
    assert facts(model.state_dict()) == of_model(name)
    assert model.tied_in.weight is model.tied_out.weight
    with torch.no_grad():
        model.features(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("name", READ)
def test_convert(name: str, tmp_path: Path) -> None:
    """To a torch zip and to safetensors: the same weights."""
    for suffix in (".pt", ".safetensors"):
        anycard.convert(FILES / name, tmp_path / f"x{suffix}", key="model" if "training" in name else None)
        assert facts(anycard.read(tmp_path / f"x{suffix}")) == of_model(name)


def old_python() -> str:
    """An interpreter with a PyTorch below 2.0; skips where there is none."""
    python = os.environ.get("ANYCARD_OLD_PYTHON", "/usr/bin/python3")
    try:
        done = subprocess.run(
            [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=False
        )
    except OSError:
        done = None
    if done is None or done.returncode != 0 or int(done.stdout.partition(".")[0]) >= 2:
        pytest.skip(f"{python} has no PyTorch below 2.0; ANYCARD_OLD_PYTHON may name one that has")
    return python


class Block(nn.Module):
    """A small residual block, as torchvision's resnets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 5)


def torch_only() -> nn.Module:
    """Made of torch's own classes: a whole model of it needs nothing else."""
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.SiLU(), drop=nn.Dropout(0.1),
            pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten(), norm=nn.LayerNorm(16), fc=nn.Linear(16, 5),
        )
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last).eval()


def plain_values() -> OrderedDict[str, torch.Tensor]:
    base = torch.arange(24.0)
    return OrderedDict(
        view=base[2:5], strided=base.view(4, 6).t(), expanded=base[:1].expand(3, 2), bf16=torch.randn(3).bfloat16(),
        half=torch.randn(3).half(), c64=torch.randn(2, dtype=torch.complex64), i64=torch.tensor(-3),
        c128=torch.randn(2, dtype=torch.complex128).conj(), bool=torch.tensor([True, False]), empty=torch.empty(0, 4),
        parameter=nn.Parameter(torch.ones(2)), nan=torch.tensor([float("nan"), -0.0]), i8=torch.tensor([-1]).char(),
        channels_last=torch.randn(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    )  # fmt: skip


def objects() -> dict[str, Any]:
    """File name -> what anycard saves in it."""
    torch.manual_seed(0)
    block, net = Block(), Net()
    optimizer = torch.optim.Adam(block.parameters())
    sum(parameter.square().sum() for parameter in block.parameters()).backward()
    optimizer.step()
    return {
        "weights.pth": block, "parallel.pt": nn.DataParallel(block), "bf16.bin": Block().bfloat16(), "tied.pkl": net,
        "values.pt": plain_values(), "state.ckpt": {"model": block, "optimizer": optimizer, "epoch": 3},
        "whole.pt": torch_only(), "whole_parallel.pth": nn.DataParallel(torch_only()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the old PyTorch finds in each file; one process, since it takes a while to start."""
    python = old_python()
    folder = tmp_path_factory.mktemp("old")
    for name, obj in objects().items():
        anycard.save(obj, folder / name, whole=name.startswith("whole"))
    anycard.save(objects()["tied.pkl"], folder / "x.safetensors")
    anycard.convert(folder / "x.safetensors", folder / "converted.pth")
    (folder / "x.safetensors").unlink()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SAVED, "converted.pth"])
    paths = [str(path) for path in sorted(folder.iterdir())]
    done = subprocess.run([python, str(HERE / "load.py"), *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert len(reports) == len(paths)
    return reports


SAVED = (
    "weights.pth",
    "parallel.pt",
    "bf16.bin",
    "tied.pkl",
    "values.pt",
    "state.ckpt",
    "whole.pt",
    "whole_parallel.pth",
)


@pytest.mark.parametrize("name", [*SAVED, "converted.pth"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_old_torch_loads_what_we_save(name: str, loaded: dict[str, dict[str, Any]]) -> None:
    """Plain `torch.load` of 1.13: names, dtypes, shapes and bits, ties and whole models included."""
    obj = objects()["tied.pkl" if name == "converted.pth" else name]
    inner = obj.module if isinstance(obj, nn.DataParallel) else obj
    if isinstance(inner, dict):
        inner = {key: held.state_dict() if hasattr(held, "state_dict") else held for key, held in inner.items()}
    report = loaded[name]
    assert report["tensors"] == facts(dict(entries(inner)))
    tied = [["tied_in.weight", "tied_out.weight"]] if name in ("tied.pkl", "converted.pth") else []
    assert report["tied"] == tied
    if name.startswith("whole"):
        assert report["module"] == "Sequential"
        with torch.no_grad():
            want = inner(torch.ones(2, 3, 8, 8)).flatten()
        assert torch.allclose(torch.tensor(report["forward"]), want, atol=1e-5)
