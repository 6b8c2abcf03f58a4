"""Plain pickles: `pickle.dump`, cloudpickle, joblib; tensors as torch files within the pickle, arrays of numpy."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import pickle
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, filled, quiet, tagged, weights

PROTOCOLS = range(6)


def net(seed: int = 0) -> nn.Module:
    """Small, with a batch norm's integer counter; one tensor is long enough to stay in the file."""
    return filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(64, 32)), seed)


def listed(path: Path) -> dict[str, np.ndarray]:
    with anycard.open(path) as ckpt:
        assert ckpt.format == "plain pickle"
        return {name: ckpt.numpy(name) for name in ckpt.tensors}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_state_dict(protocol: int, tmp_path: Path) -> None:
    """A state dict by pickle.dump in every protocol: read, loaded, verified, converted, from a file and a stream."""
    path, model = tmp_path / "x.pkl", net()
    path.write_bytes(pickle.dumps(model.state_dict(), protocol))
    with quiet():
        assert_same(anycard.read(path), weights(model))
        assert_same(anycard.read(io.BytesIO(path.read_bytes())), weights(model))
        assert_same(anycard.load(path, net(1)).state_dict(), weights(model))
        assert anycard.verify(path).ok
        anycard.convert(path, tmp_path / "y.safetensors")
        assert anycard.diff(path, tmp_path / "y.safetensors").equal


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whole_model(protocol: int, tmp_path: Path) -> None:
    """A module by pickle.dump: weights and tree without its classes, and rebuilt."""
    path, model = tmp_path / "x.pkl", net()
    path.write_bytes(pickle.dumps({"model": nn.DataParallel(model), "epoch": 3}, protocol))
    assert_same(anycard.read(path), weights(model))
    with anycard.open(path) as ckpt:
        assert ckpt.wrappers and ckpt.objects["epoch"] == 3
    path.write_bytes(pickle.dumps(model, protocol))
    assert_same(anycard.load(path).state_dict(), weights(model))


@pytest.mark.parametrize("protocol", [2, 4])
def test_card_tags_and_every_dtype(protocol: int, tmp_path: Path) -> None:
    """Storages tagged for absent cards; dtypes that numpy lacks; views, and a scalar."""
    path = tmp_path / "x.pkl"
    dtypes = [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64,
              torch.uint16, torch.float8_e4m3fn]  # fmt: skip
    held = {str(d): (torch.arange(700) % 2).to(d).reshape(7, 100) for d in dtypes}
    held |= {"view": torch.arange(900.0)[3:].reshape(3, 299).T, "scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    with tagged("cuda:7"):
        path.write_bytes(pickle.dumps(held, protocol))
    assert_same(anycard.read(path), held)
    with anycard.open(path) as ckpt:
        assert {info.device for info in ckpt.tensors.values()} == {"cuda:7"}
        # Protocol 2 spells bytes as text, later ones as they are: those are read straight from the file.
        assert (ckpt.tensors["view"].offset is None) is (protocol == 2)


def test_bytes_are_read_from_the_file(tmp_path: Path) -> None:
    """The offset that is listed is where the values lie."""
    path = tmp_path / "x.pkl"
    value = torch.arange(5_000.0)
    path.write_bytes(pickle.dumps({"a": value, "b": np.arange(9_000)}))
    with anycard.open(path) as ckpt:
        info = ckpt.tensors["a"]
        assert info.offset is not None and info.file == str(path)
        assert path.read_bytes()[info.offset :][: info.nbytes] == value.numpy().tobytes()
        assert ckpt.numpy("b").tolist() == list(range(9_000))


def test_zip_within_a_pickle(tmp_path: Path) -> None:
    """`_load_from_bytes` of a torch zip, which torch.load takes as well."""

    class Holds:
        def __reduce__(self) -> Any:
            file = io.BytesIO()
            torch.save({"w": torch.arange(800.0)}, file)
            return torch.storage._load_from_bytes, (file.getvalue(),)

    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"inner": Holds()}))
    assert torch.equal(pickle.loads(path.read_bytes())["inner"]["w"], torch.arange(800.0))
    assert np.array_equal(listed(path)["inner.w"], np.arange(800, dtype=np.float32))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy(protocol: int, tmp_path: Path) -> None:
    """Arrays of every order, and those that numpy 1 wrote."""
    path = tmp_path / "x.pkl"
    held = {
        "c": np.arange(600.0).reshape(20, 30), "f": np.asfortranarray(np.arange(600).reshape(20, 30)),
        "big": np.arange(600, dtype=">f4"), "k": np.arange(600.0).reshape(2, 10, 30).transpose(1, 0, 2),
        "h": np.ones(3, np.float16), "empty": np.empty((0, 4)),
    }  # fmt: skip
    data = pickle.dumps(held, protocol)
    for names in (data, data.replace(b"numpy._core", b"numpy.core") if protocol < 4 else data):
        path.write_bytes(names)
        got = listed(path)
        assert set(got) == set(held)
        for name, value in held.items():
            assert np.array_equal(got[name], value), name


def test_thousands_of_tensors(tmp_path: Path) -> None:
    """Each is a torch file of its own; the time stays in proportion."""
    path = tmp_path / "x.pkl"
    held = {f"layer.{i}": torch.full((3,), float(i)) for i in range(4_000)}
    path.write_bytes(pickle.dumps(held))
    began = time.process_time()
    with anycard.open(path) as ckpt:
        assert len(ckpt.tensors) == 4_000
    assert time.process_time() - began < 5
    assert_same(anycard.read(path), held)


def test_stacked(tmp_path: Path) -> None:
    """Several pickles in a row: the first is the object, as for pickle.load, and the others are told of."""
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": torch.ones(2)}) + pickle.dumps({"b": 1}) + pickle.dumps(3, 2) + b"rest")
    with anycard.open(path) as ckpt:
        assert (list(ckpt.tensors), ckpt.metadata) == (["a"], {"pickles": 3})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_damaged(protocol: int, tmp_path: Path) -> None:
    """Cut short or changed anywhere: FormatError, or another object, and nothing else."""
    whole = pickle.dumps({"a": torch.arange(300.0), "b": np.arange(4)}, protocol)
    path = tmp_path / "x.pkl"
    for at in range(0, len(whole), 13):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            path.write_bytes(data)
            with contextlib.suppress(anycard.CheckpointError):
                listed(path)


@pytest.mark.parametrize("data", [b"(hello) world\n", b"{}", b"[1, 2]", b")..", b"c. 1900\n", b"]\n"])
def test_text_is_no_pickle(data: bytes, tmp_path: Path) -> None:
    """Text that begins as a text pickle might."""
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(anycard.FormatError, match="no checkpoint"):
        anycard.open(tmp_path / "x.txt")


def test_long_cut(tmp_path: Path) -> None:
    """The message of a pickle that is cut short says so, and where."""
    whole = pickle.dumps({"a": torch.arange(300.0)})
    (tmp_path / "x.pkl").write_bytes(whole[:-200])
    with pytest.raises(anycard.FormatError, match="cut short") as caught:
        anycard.open(tmp_path / "x.pkl")
    assert caught.value.offset is not None


def test_beyond_the_first_piece(tmp_path: Path) -> None:
    """A pickle longer than what is read at first."""
    path = tmp_path / "x.pkl"
    held = {"a": torch.rand(1_500_000), "b": torch.rand(1_500_000)}
    path.write_bytes(pickle.dumps(held))
    assert_same(anycard.read(path), held)


def test_a_stream_that_holds_itself_often(tmp_path: Path) -> None:
    """The same torch file asked for again and again costs no more than once."""
    inner = torch.storage._load_from_bytes
    file = io.BytesIO()
    torch.save(torch.arange(20_000.0), file, _use_new_zipfile_serialization=False)
    data = pickle.dumps((inner, file.getvalue()), 4)
    head = data[:-1] + b"0"  # both are in the memo: the function at 2 or so, the bytes after it
    body = b"".join([b"(", *[b"h\x02h\x03\x85R"] * 20_000, b"l."])
    (tmp_path / "x.pkl").write_bytes(head[:2] + head[11:] + body)
    began = time.process_time()
    with contextlib.suppress(anycard.CheckpointError), anycard.open(tmp_path / "x.pkl") as ckpt:
        assert len(ckpt.tree) == 20_000
        assert ckpt.tensors
    assert time.process_time() - began < 2


# joblib and cloudpickle.


@pytest.mark.parametrize("compress", [0, 3, ("zlib", 3), ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_joblib(compress: Any, protocol: int, tmp_path: Path) -> None:
    """joblib's own layout of arrays, compressed or not, tensors beside them."""
    joblib = pytest.importorskip("joblib")
    path = tmp_path / "x.joblib"
    held = {
        "c": np.arange(600.0).reshape(20, 30), "f": np.asfortranarray(np.arange(600).reshape(20, 30)),
        "big": np.arange(600, dtype=">f4"), "one": np.full((), 3.0), "t": torch.arange(700.0),
        "empty": np.empty((0, 4)),
    }  # fmt: skip
    joblib.dump(held, path, compress=compress, protocol=protocol)
    got = listed(path)
    assert set(got) == set(held)
    for name, value in held.items():
        assert np.array_equal(got[name], np.asarray(value)), name
    if not compress:
        with anycard.open(path) as ckpt:
            assert ckpt.tensors["c"].offset is not None


def test_joblib_of_what_torch_has_no_dtype_for(tmp_path: Path) -> None:
    """Arrays of text, of objects and of structures are passed over; what follows is right."""
    joblib = pytest.importorskip("joblib")
    path = tmp_path / "x.joblib"
    records = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    held = {"classes": np.array(["cat", "dog"]), "any": np.array([{"a": 1}, None], dtype=object), "r": records,
            "when": np.array(["2020-01-01"], "M8[D]"), "weights": {"w": np.arange(9.0)}}  # fmt: skip
    joblib.dump(held, path)
    with anycard.open(path) as ckpt:
        assert ckpt.numpy("weights.w").tolist() == list(range(9))
        assert any(path.startswith("classes") for path in ckpt.objects)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bz2.compress, lzma.compress])
def test_compressed(pack: Any, tmp_path: Path) -> None:
    """A compressed pickle is read; what else is compressed is told; damage and bombs are refused."""
    path = tmp_path / "x.pkl.gz"
    held = {"w": torch.rand(500)}
    packed = pack(pickle.dumps(held))
    path.write_bytes(packed)
    assert_same(anycard.read(path), held)
    path.write_bytes(pack(b"no pickle"))
    with pytest.raises(anycard.FormatError, match="compressed"):
        anycard.open(path)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(anycard.FormatError, match="cut short"):
        anycard.open(path)
    path.write_bytes(pack(b"\x80\x02" + b"N" * (200 << 20)))
    began = time.process_time()
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.open(path)
    assert time.process_time() - began < 3


def test_cloudpickle(tmp_path: Path) -> None:
    """A module whose class travels in the pickle: weights and tree, nothing run."""
    cloudpickle = pytest.importorskip("cloudpickle")
    space: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec(  # a class that no module has
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(30, 40)\n"
        "        self.act = lambda x: x * 2\n",
        space,
    )
    model = filled(space["Own"]())
    path = tmp_path / "x.pkl"
    path.write_bytes(cloudpickle.dumps(model))
    assert_same(anycard.read(path), weights(model))
    with anycard.open(path) as ckpt:
        assert "Own(" in "\n".join(anycard_tree(ckpt))


def anycard_tree(ckpt: anycard.Checkpoint) -> list[str]:
    """What `show --tree` prints."""
    from anycard.names.module_tree import tree_lines

    return list(tree_lines(ckpt.tree))
