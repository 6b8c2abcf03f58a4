"""The spine, through the public interface, against real torch and real safetensors."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import anycard


class Net(nn.Module):
    """Small: weights, float buffers, an integer buffer, a child with the unlucky name."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.module = nn.Linear(4, 4)
        self.fc = nn.Linear(4, classes)
        self.register_buffer("scale", torch.arange(3.0), persistent=False)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values that no initialisation would give."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + seed)
            else:
                tensor.fill_(7 + seed)
    return model


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].detach(), tensor.detach()), name


WRAP = {
    "bare": lambda m: m,
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "nested": lambda m: torch.compile(nn.DataParallel(m)),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("wrapper", WRAP)
def test_weights_have_canonical_names_and_load_into_any_wrapper(tmp_path, suffix, wrapper):
    """However the model is wrapped, the file has canonical names, and any wrapper takes it."""
    model = filled(Net())
    path = tmp_path / f"weights{suffix}"
    anycard.save(WRAP[wrapper](model), path)

    theirs = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
    assert_same(theirs, model.state_dict())
    for wrap in WRAP.values():
        target = filled(Net(), 3)
        anycard.load(path, wrap(target))
        inner = target if wrap is not AveragedModel else wrap(target).module
        if wrap is not AveragedModel:
            assert_same(inner.state_dict(), model.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["bare", "parallel", "compiled", "nested"])
def test_files_of_plain_torch_load(tmp_path, wrapper, legacy):
    """What torch.save wrote of any wrapper loads into a bare model, built or given."""
    model = filled(Net())
    path = tmp_path / "theirs.pth"
    torch.save(WRAP[wrapper](model).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    for target in (filled(Net(), 3), Net):
        assert_same(anycard.load(path, target).state_dict(), model.state_dict())


def test_every_dtype_reads_back(tmp_path):
    """Every dtype, views, strides, ties, empty and scalar tensors: what torch wrote, we read; and back."""
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 uint32 uint64"
    )
    state = {name: torch.arange(6).to(getattr(torch, name)) for name in names.split()}
    for name in ("float8_e4m3fn", "float8_e5m2"):
        state[name] = torch.rand(5).to(getattr(torch, name))
    base = torch.arange(12.0)
    state |= {"view": base[2:5], "strided": base.view(3, 4).t(), "gaps": base[::2], "tied": base, "again": base}
    state |= {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
    }
    for legacy in (False, True):
        torch.save(state, tmp_path / "t.pt", _use_new_zipfile_serialization=not legacy)
        got = anycard.read(tmp_path / "t.pt")
        for name, want in state.items():
            bits = (lambda t: t.view(torch.uint8)) if name.startswith("float8") else (lambda t: t)
            assert torch.equal(bits(got[name]), bits(want)), name
    anycard.save(state, tmp_path / "ours.pt")
    theirs = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert all(theirs[n].dtype == t.dtype and theirs[n].shape == t.shape for n, t in state.items())
    assert theirs["tied"].data_ptr() == theirs["again"].data_ptr()
    assert torch.equal(theirs["gaps"], state["gaps"])


def test_a_refused_load_changes_nothing(tmp_path):
    """Another number of classes: refused with both shapes; strict=False loads the rest."""
    model = filled(Net(7), 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    anycard.save(filled(Net(5)), tmp_path / "five.pth")
    with pytest.raises(anycard.MismatchError, match=r"fc\.weight") as caught:
        anycard.load(tmp_path / "five.pth", model)
    assert caught.value.plan.shapes["fc.weight"] == ((5, 4), (7, 4))
    assert_same(model.state_dict(), before)
    with pytest.warns(UserWarning, match=r"fc\.bias"):
        anycard.load(tmp_path / "five.pth", model, strict=False)
    assert torch.equal(model.conv.weight, filled(Net(5)).conv.weight)
    assert torch.equal(model.fc.bias, before["fc.bias"])


@pytest.mark.parametrize("legacy", [False, True])
def test_every_truncation_is_a_format_error(tmp_path, legacy):
    """Cut anywhere, a file gives FormatError and leaves the model alone; nothing else is raised."""
    path = tmp_path / "whole.pth"
    torch.save(filled(Net()).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 61):
        (tmp_path / "cut.pth").write_bytes(data[:size])
        with pytest.raises(anycard.FormatError):
            anycard.read(tmp_path / "cut.pth")


def test_every_changed_byte_is_noticed_or_harmless(tmp_path):
    """A flipped byte in a file of ours is found by verify, or is refused as a format error."""
    path = tmp_path / "ours.pth"
    anycard.save(filled(Net()), path)
    data = bytearray(path.read_bytes())
    with anycard.open(path) as ckpt:
        info = ckpt.tensors["conv.weight"]
        data[info.offset + 5] ^= 0xFF
    path.write_bytes(data)
    assert anycard.verify(path).damaged == ("conv.weight",)
    with pytest.raises(anycard.FormatError, match=r"conv\.weight"):
        anycard.load(path, Net)


def test_whole_models(tmp_path):
    """A whole model loses wrapper and cards, rebuilds with allow=, and gives its weights without it."""
    model = filled(Net())
    path = tmp_path / "whole.pt"
    anycard.save(nn.DataParallel(model), path, whole=True)
    assert_same(torch.load(path, weights_only=False).state_dict(), model.state_dict())
    with pytest.raises(anycard.UntrustedError, match="Net"):
        anycard.load(path)
    rebuilt = anycard.load(path, allow=[Net.__module__])
    assert type(rebuilt) is Net
    assert_same(rebuilt.state_dict(), model.state_dict())
    assert torch.equal(rebuilt.scale, model.scale)
    assert_same(anycard.read(path), model.state_dict())
    torch.save(model.state_dict, tmp_path / "forgotten.pt")
    assert_same(anycard.load(tmp_path / "forgotten.pt", Net).state_dict(), model.state_dict())


def test_an_assigned_state_dict_is_an_error(tmp_path):
    """`model.state_dict = loaded` is said, with the mend, by save, load and plan."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    model = Net()
    model.state_dict = torch.load(tmp_path / "a.pth")
    for call in (anycard.load, anycard.plan):
        with pytest.raises(anycard.CheckpointError, match=r"del model\.state_dict"):
            call(tmp_path / "a.pth", model)
    with pytest.raises(anycard.CheckpointError, match=r"del model\.state_dict"):
        anycard.save(model, tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


def test_absent_devices():
    """A device that is not there is a DeviceError that says what is."""
    buffer = io.BytesIO()
    anycard.save(Net(), buffer)
    buffer.seek(0)
    with pytest.raises(anycard.DeviceError, match="cpu"):
        anycard.load(buffer, Net, device="cuda:93")


def test_dict_of_objects(tmp_path):
    """A model, an optimizer and plain values go out and come back."""
    model = filled(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    anycard.save({"model": model, "optimizer": optimizer, "epoch": 3}, tmp_path / "s.ckpt")
    assert torch.load(tmp_path / "s.ckpt", weights_only=True)["epoch"] == 3
    other = Net()
    fresh = torch.optim.Adam(other.parameters())
    state = anycard.load(tmp_path / "s.ckpt", {"model": other, "optimizer": fresh})
    assert state["epoch"] == 3
    assert fresh.param_groups[0]["lr"] == 0.5
    assert_same(other.state_dict(), model.state_dict())


def test_same_weights_same_bytes_and_fingerprint(tmp_path):
    """The bytes do not depend on name or wrapper; the fingerprint not on the format."""
    model = filled(Net())
    anycard.save(model, tmp_path / "a.pth")
    anycard.save(nn.DataParallel(model), tmp_path / "other.pt")
    anycard.save(model, tmp_path / "c.safetensors")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "other.pt").read_bytes()
    marks = set()
    for name in ("a.pth", "c.safetensors"):
        with anycard.open(tmp_path / name) as ckpt:
            marks.add(ckpt.fingerprint())
    assert len(marks) == 1


def test_convert_and_diff(tmp_path):
    """Both ways between torch zip and safetensors, the weights stay the same."""
    torch.save(nn.DataParallel(filled(Net())).state_dict(), tmp_path / "a.pth")
    anycard.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    anycard.convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert anycard.diff(tmp_path / "a.pth", tmp_path / "c.pt").equal
    assert_same(torch.load(tmp_path / "c.pt", weights_only=True), filled(Net()).state_dict())


def test_the_core_needs_no_torch(tmp_path):
    """show, convert, diff, fingerprint and verify run where torch cannot be imported."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from anycard.cli.main import cli\n"
        "a, b = sys.argv[1:]\n"
        "for args in (['show', a], ['convert', a, b], ['diff', a, b], ['fingerprint', b], ['verify', a]):\n"
        "    try: cli(args)\n"
        "    except SystemExit as end: assert not end.code, (args, end.code)\n"
    )
    files = [str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, stdout=subprocess.DEVNULL)


def test_what_needs_torch_says_so(tmp_path):
    """Where torch is not installed: `check` ends in a line and 2, and so does a program that asks for `load`."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    ways = (
        "from anycard.cli.main import run; sys.argv = ['anycard', 'check', sys.argv[1], 'os:getcwd']; run()",
        "import anycard\ntry: anycard.load\nexcept ModuleNotFoundError as error: sys.exit(str(error))",
        "from anycard import read",
        "import anycard\ntry: anycard.open(sys.argv[1]).torch('fc.weight')\n"
        "except ModuleNotFoundError as error: sys.exit(str(error))",
        "from anycard.cli.main import run; sys.argv = ['anycard', 'matrix', 'os:getcwd']; run()",
    )
    for way, code in zip(ways, (2, 1, 1, 1, 2), strict=True):
        command = [sys.executable, "-c", f"import sys; sys.modules['torch'] = None\n{way}", str(tmp_path / "a.pth")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, "needs PyTorch" in done.stderr) == (code, True), done.stderr
        assert code == 1 or "Traceback" not in done.stderr


def test_what_is_listed_is_there(tmp_path):
    """Where torch is not installed the public names are those that can do without it."""
    code = "import sys; sys.modules['torch'] = None\nimport anycard\nfrom anycard import *\nprint(*dir(anycard))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(anycard.__all__) - set(done.stdout.split()) == {"load", "plan", "read", "save"}


def test_a_killed_save_leaves_the_old_file(tmp_path):
    """SIGKILL in the middle of a save: the old file stays, and the next save clears the litter."""
    path = tmp_path / "model.pth"
    anycard.save(filled(Net()), path)
    before = path.read_bytes()
    code = (
        "import os, sys, time\nfrom anycard.disk.atomic import replace_file\n"
        "with replace_file(sys.argv[1]) as f:\n f.write(b'half'); f.flush(); print('x', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    anycard.save(filled(Net()), path)
    assert len(list(Path(tmp_path).iterdir())) == 2, "a living process's file was taken"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert path.read_bytes() == before
    anycard.save(filled(Net()), path)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "LFS")],
)
def test_unrelated_files(tmp_path, content, word):
    """An empty file, a web page, a Git LFS pointer: the error says what it is."""
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(anycard.FormatError, match=word):
        anycard.open(tmp_path / "x.pth")


def test_import_is_light():
    """The exported names are there, and torch is not imported by `import anycard`."""
    code = "import sys, anycard; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in anycard.__all__:
        assert getattr(anycard, name) is not None


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_nothing_large_waits_for_a_collection(tmp_path, suffix):
    """What a load made beside the model is gone when it returns; few small objects are left to the collector."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(500)])
    anycard.save(model, tmp_path / f"a{suffix}")
    anycard.load(tmp_path / f"a{suffix}", model)
    gc.collect()
    gc.disable()
    try:
        anycard.load(tmp_path / f"a{suffix}", model)
        assert gc.collect() < 200
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_an_empty_state_dict_is_one(tmp_path, name):
    """A module without tensors is saved, read, compared and hashed as any other."""
    anycard.save(torch.nn.ReLU(), tmp_path / name)
    assert anycard.read(tmp_path / name) == {}
    assert anycard.diff(tmp_path / name, tmp_path / name).same == 0
    with anycard.open(tmp_path / name) as ckpt:  # the digest of nothing at all, as BLAKE3's authors give it
        assert ckpt.fingerprint() == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
