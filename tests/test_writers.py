"""The writers: atomic files, zip archives, pickles, safetensors; read by plain torch and safetensors."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anycard.containers import zip_writer
from anycard.disk.atomic import replace_file
from anycard.disk.pieces import Bytes, FileRange, Lazy
from anycard.disk.source import open_source
from anycard.errors import CheckpointError, FormatError
from anycard.formats.safetensors import read_index, write_safetensors
from anycard.formats.torch_zip_writer import write_torch_zip
from anycard.limits import DEFAULT, Limits
from anycard.pickles.writer import GlobalRef, Reduced, TensorRef, dump
from anycard.tensors import DTYPES, row_major

TINY = Limits(chunk_nbytes=7)
NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex128", "complex64", "complex32", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
SHAPE = (3, 5)


def tensors() -> dict[str, torch.Tensor]:
    made = {}
    for name in NAMES:
        data = torch.arange(15 * DTYPES[name].itemsize, dtype=torch.uint8) % 2
        made[name] = data.view(getattr(torch, name)).reshape(SHAPE)
    return made


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def zip_bytes(state: dict[str, torch.Tensor], limits: Limits = DEFAULT, mark: dict[str, object] | None = None) -> bytes:
    refs: OrderedDict[str, object] = OrderedDict()
    for key, name in enumerate(state):
        refs[name] = TensorRef(str(key), name, "cpu", 15, 0, SHAPE, row_major(SHAPE))
    refs._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    file = io.BytesIO()
    write_torch_zip(file, dump(refs), [Bytes(raw(t)) for t in state.values()], mark, limits)
    return file.getvalue()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("limits", [DEFAULT, TINY])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_load(tmp_path: Path, mmap: bool, limits: Limits) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensors(), limits, {"anycard": 1}))
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert list(state) == list(NAMES)
    assert state._metadata == {"": {"version": 1}}
    for name, want in tensors().items():
        assert state[name].dtype == want.dtype and raw(state[name]) == raw(want)
        assert state[name].data_ptr() % 64 == 0 or not mmap
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/.anycard.json") == b'{"anycard":1}'
        assert archive.namelist()[:4] == [
            "archive/data.pkl", "archive/.format_version", "archive/.storage_alignment", "archive/byteorder",
        ]  # fmt: skip


def test_same_input_same_bytes() -> None:
    assert zip_bytes(tensors()) == zip_bytes(tensors(), TINY)


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_writer, "_U32", 40)
    monkeypatch.setattr(zip_writer, "_U16", 3)
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes({"float32": tensors()["float32"]}))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 6
    for mmap in (False, True):
        assert torch.load(path, weights_only=True, mmap=mmap)["float32"].shape == SHAPE


def test_zip_name_in_utf8_and_wrong_piece() -> None:
    file = io.BytesIO()
    zip_writer.write_zip(file, [("a/é中", Bytes(b"xy")), ("a/empty", Bytes(b""))], TINY)
    with zipfile.ZipFile(file) as archive:
        assert archive.read("a/é中") == b"xy" and archive.read("a/empty") == b""
    with pytest.raises(CheckpointError, match="planned"):
        zip_writer.write_zip(io.BytesIO(), [("a", Lazy(3, lambda: memoryview(b"xy")))], DEFAULT)
    with pytest.raises(CheckpointError, match="twice"):
        zip_writer.write_zip(io.BytesIO(), [("a", Bytes(b"")), ("a", Bytes(b""))], DEFAULT)


def test_file_range(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(50)))
    source = open_source(path)
    assert b"".join(map(bytes, FileRange(source, 5, 20).chunks(7))) == bytes(range(5, 25))
    source.close()


def test_pickle_does_not_depend_on_identity() -> None:
    def value(text: str) -> object:
        other = "".join(["long ", "text"])
        return [text, other, {"a": (1, text), "b": (1, other)}, b"", b"bytes", bytes([98]), {"y", "x", text}]

    one, two = "long text", "".join(list("long text"))
    assert dump(value(one)) == dump(value(two))
    back = pickle.loads(dump(value(two)))
    assert back == value(one)
    assert pickle.loads(dump((1, (1.0,), (True,), (1,), -0.0, {3, 1})))[1:4] == ((1.0,), (True,), (1,))
    assert dump({f"k{i}" for i in range(50)}) == dump({f"k{i}" for i in reversed(range(50))})


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_plain_data_and_parameters(tmp_path: Path) -> None:
    ref = TensorRef("0", "float32", "cpu", 4, 1, (2,), (1,), requires_grad=True, parameter=True)
    tree = {
        "p": ref, "tied": ref, "size": Reduced(GlobalRef("torch", "Size"), ((2, 3),)), "set": {"b", "a"},
        "device": Reduced(GlobalRef("torch", "device"), ("cuda", 1)), "bytes": b"\0\xff", "none": b"",
        "dtype": GlobalRef("torch", "bfloat16"), "big": 1 << 70,
    }  # fmt: skip
    path = tmp_path / "x.pt"
    with replace_file(path) as file:
        write_torch_zip(file, dump(tree), [Bytes(raw(torch.arange(4.0)))], None, DEFAULT)
    back = torch.load(path, weights_only=True)
    assert back["p"] is back["tied"] and isinstance(back["p"], torch.nn.Parameter) and back["p"].requires_grad
    assert back["p"].tolist() == [1.0, 2.0]
    assert back["size"] == torch.Size((2, 3)) and back["device"] == torch.device("cuda", 1)
    assert back["bytes"] == b"\0\xff" and back["none"] == b"" and back["set"] == {"a", "b"}
    assert back["dtype"] == torch.bfloat16 and back["big"] == 1 << 70


def test_old_torch_reads(tmp_path: Path) -> None:
    old = subprocess.run(["/usr/bin/python3", "-c", "import torch; print(torch.__version__)"], capture_output=True)
    if old.returncode != 0:
        pytest.skip("no old torch under /usr/bin/python3")
    path = tmp_path / "x.pt"
    few = {name: tensor for name, tensor in tensors().items() if DTYPES[name].storage}
    path.write_bytes(zip_bytes(few, DEFAULT, {"anycard": 1}))
    code = "import sys,torch; s=torch.load(sys.argv[1]); print(len(s), s['float32'].sum().item() == s['float32'].sum().item())"
    done = subprocess.run(["/usr/bin/python3", "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(len(few))


HOLD = """
import sys, time
from anycard.disk.atomic import replace_file
with replace_file(sys.argv[1]) as file:
    file.write(b"new"); file.flush(); print("ready", flush=True); time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_killed_and_living_writers(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    killed, living = hold(path), hold(path)
    try:
        end(killed)
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 3
        with replace_file(path) as file:
            file.write(b"mine")
        assert path.read_bytes() == b"mine"
        left = [p.name for p in tmp_path.iterdir() if p != path]
        assert len(left) == 1 and f".{living.pid}." in left[0]
    finally:
        end(living)
    with replace_file(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_modes_links_and_faults(tmp_path: Path) -> None:
    path, link = tmp_path / "x.pt", tmp_path / "link"
    link.symlink_to(path)
    with replace_file(link) as file:
        file.write(b"1")
    assert link.is_symlink() and path.read_bytes() == b"1"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    with replace_file(str(path)) as file:
        file.write(b"2")
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ZeroDivisionError), replace_file(path) as file:
        file.write(b"3" * 100_000)
        raise ZeroDivisionError
    assert path.read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(FileNotFoundError, match="nowhere"), replace_file(tmp_path / "nowhere" / "x"):
        pass
    with pytest.raises(IsADirectoryError), replace_file(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="no regular file"), replace_file("/dev/null"):
        pass


def test_full_disk(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mount is not permitted")
    try:
        path = tmp_path / "x.pt"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match="No space left") as caught, replace_file(path) as file:
            for _ in range(64):
                file.write(bytes(8192))
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    finally:
        time.sleep(0.05)
        subprocess.run(["umount", tmp_path], check=True)
