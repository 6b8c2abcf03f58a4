"""The writers: atomic files, zip archives, pickles, safetensors; read by plain torch and safetensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

import anycard
from anycard.containers import zip_writer
from anycard.disk.atomic import replace_file
from anycard.disk.pieces import Bytes, FileRange, Lazy
from anycard.disk.source import open_source
from anycard.errors import CheckpointError, FormatError
from anycard.formats.safetensors import read_index
from anycard.formats.safetensors_writer import write_safetensors
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
        assert state[name].dtype == want.dtype
        assert raw(state[name]) == raw(want)
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
        assert archive.testzip() is None
        assert len(archive.namelist()) == 6
    for mmap in (False, True):
        assert torch.load(path, weights_only=True, mmap=mmap)["float32"].shape == SHAPE


def test_zip_name_in_utf8_and_wrong_piece() -> None:
    file = io.BytesIO()
    zip_writer.write_zip(file, [("a/é中", Bytes(b"xy")), ("a/empty", Bytes(b""))], TINY)
    with zipfile.ZipFile(file) as archive:
        assert archive.read("a/é中") == b"xy"
        assert archive.read("a/empty") == b""
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
    assert back["p"] is back["tied"]
    assert isinstance(back["p"], torch.nn.Parameter)
    assert back["p"].requires_grad
    assert back["p"].tolist() == [1.0, 2.0]
    assert back["size"] == torch.Size((2, 3))
    assert back["device"] == torch.device("cuda", 1)
    assert back["bytes"] == b"\0\xff"
    assert back["none"] == b""
    assert back["set"] == {"a", "b"}
    assert back["dtype"] == torch.bfloat16
    assert back["big"] == 1 << 70


def test_old_torch_reads(tmp_path: Path) -> None:
    old = subprocess.run(["/usr/bin/python3", "-c", "import torch; print(torch.__version__)"], capture_output=True)
    if old.returncode != 0:
        pytest.skip("no old torch under /usr/bin/python3")
    path = tmp_path / "x.pt"
    few = {name: tensor for name, tensor in tensors().items() if DTYPES[name].storage}
    path.write_bytes(zip_bytes(few, DEFAULT, {"anycard": 1}))
    code = "import sys,torch; s=torch.load(sys.argv[1]); print(len(s), s['int64'].tolist())"
    done = subprocess.run(["/usr/bin/python3", "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(few)} {few['int64'].tolist()}"


HOLD = """
import sys, time
from anycard.disk.atomic import replace_file
with replace_file(sys.argv[1]) as file:
    file.write(b"new"); file.flush(); print("ready", flush=True); time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
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
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 3
        with replace_file(path) as file:
            file.write(b"mine")
        assert path.read_bytes() == b"mine"
        left = [p.name for p in tmp_path.iterdir() if p != path]
        assert len(left) == 1
        assert f".{living.pid}." in left[0]
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
    assert link.is_symlink()
    assert path.read_bytes() == b"1"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    with replace_file(str(path)) as file:
        file.write(b"2")
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ZeroDivisionError), replace_file(path) as file:
        file.write(b"3" * (1 // 0))
    assert path.read_bytes() == b"2"
    assert len(list(tmp_path.iterdir())) == 2
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
            file.writelines(bytes(8192) for _ in range(64))
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
    finally:
        time.sleep(0.05)
        subprocess.run(["umount", tmp_path], check=True)


def safetensors_bytes(limits: Limits = DEFAULT) -> bytes:
    held = {name: tensor for name, tensor in tensors().items() if DTYPES[name].safetensors}
    rows = [(name, name, SHAPE, Bytes(raw(tensor))) for name, tensor in reversed(held.items())]
    rows.append(("empty", "float32", (0, 3), Bytes(b"")))  # type: ignore[arg-type]
    file = io.BytesIO()
    meta = {"anycard": '{"anycard":1}', "tied": "bool"}
    write_safetensors(file, rows, meta, limits, ties={"tied": "bool"})
    return file.getvalue()


def test_safetensors(tmp_path: Path) -> None:
    data = safetensors_bytes()
    assert data == safetensors_bytes(TINY)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    back = load_file(path)
    for name, want in tensors().items():
        if DTYPES[name].safetensors:
            assert back[name].dtype == want.dtype
            assert raw(back[name]) == raw(want)
    source = open_source(path)
    index = read_index(source, DEFAULT)
    assert index.mark == {"anycard": 1}
    assert index.metadata["format"] == "pt"
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    rows = []
    for name in (*index.tree, "tied"):
        info = index.tree["bool" if name == "tied" else name]
        digest = blake3(source.read(info.offset, info.nbytes)).hexdigest()
        row = [name, info.dtype, list(info.shape), digest]
        rows.append((name.encode(), json.dumps(row, separators=(",", ":")).encode() + b"\n"))
    whole = blake3(b"".join(line for _, line in sorted(rows))).hexdigest()
    assert index.metadata["anycard.fingerprint"] == "blake3:" + whole
    sizes = [info.offset for info in sorted(index.tree.values(), key=lambda i: -DTYPES[i.dtype].itemsize)]
    assert sizes == sorted(sizes)
    source.close()


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def entry(begin: int, end: int, dtype: str = "U8", shape: str = "[2]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


BAD = {
    "cut short: 4 bytes": b"abcd",
    "header claims": (1 << 60).to_bytes(8, "little") + b"{}",
    "header should have": (99).to_bytes(8, "little") + b"{}",
    "twice": header(f'{{"a":{entry(0, 2)},"a":{entry(0, 2)}}}', b"xy"),
    "NaN": header('{"a":NaN}'),
    "no valid JSON": header("[" * 100_000),
    "'F6_E2M3' has less": header(f'{{"a":{entry(0, 1, "F6_E2M3")}}}', b"x"),
    "no whole number": header(f'{{"a":{entry(0, 1, "F4", "[3]")}}}', b"x"),
    "'Q9' is not known": header(f'{{"a":{entry(0, 1, "Q9")}}}', b"x"),
    "overlaps": header(f'{{"a":{entry(0, 2)},"b":{entry(1, 3)}}}', b"xyz"),
    "leaves a hole": header(f'{{"a":{entry(0, 2)},"b":{entry(3, 5)}}}', b"xyzab"),
    "needs 3 bytes": header(f'{{"a":{entry(0, 2, shape="[3]")}}}', b"xy"),
    "dimensions": header(f'{{"a":{entry(0, 1, shape=str([1] * 300))}}}', b"x"),
    "non-negative": header(f'{{"a":{entry(0, 2, shape="[-2]")}}}', b"xy"),
    "promised": header(f'{{"a":{entry(0, 2)}}}', b"x"),
    "no tensor owns": header(f'{{"a":{entry(0, 2)}}}', b"xyz"),
    "from text to text": header('{"__metadata__":{"a":1}}'),
    "is not a map": header('{"__metadata__":[]}'),
    "lacks dtype": header('{"a":{"shape":[]}}'),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_safetensors(message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_index(open_source(io.BytesIO(BAD[message])), DEFAULT)
    assert caught.value.offset is not None


def test_safetensors_cannot_hold() -> None:
    for row in (("a", "complex128", (1,), Bytes(bytes(16))), ("a", "float32", (2,), Bytes(bytes(4)))):
        with pytest.raises(CheckpointError, match="a: "):
            write_safetensors(io.BytesIO(), [row], {}, DEFAULT)


class Hesitant(io.RawIOBase):
    """An unbuffered file that takes few bytes at a time, and at its end what `then` says."""

    def __init__(self, room: int, then: int | None = 0) -> None:
        self.data, self.room, self.then = b"", room, then

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int | None:
        took = bytes(data)[: min(1000, self.room - len(self.data))]
        self.data += took
        return len(took) if took else self.then


class Silent:
    """A file-like object whose `write` gives nothing back."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


@pytest.mark.parametrize("then", [0, None])
def test_an_open_file_that_takes_a_part_at_a_time(then: int | None) -> None:
    """It gets all of it, by as many calls as that takes; one that takes no more is an OSError, not a success."""
    weights = {"w": torch.arange(5000.0)}
    whole = io.BytesIO()
    anycard.save(weights, whole)
    size = len(whole.getvalue())
    slow, silent = Hesitant(size, then), Silent()
    anycard.save(weights, slow)
    anycard.save(weights, silent)  # type: ignore[arg-type]
    assert slow.data == silent.data == whole.getvalue()
    for room in (0, size - 1):
        with pytest.raises(OSError, match="cut short"):
            anycard.save(weights, Hesitant(room, then))
