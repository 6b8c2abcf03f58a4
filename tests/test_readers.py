"""The readers of torch zips and legacy streams: real files of torch, hostile pickles, cut files."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from anycard.checkpoint import as_numpy
from anycard.containers.zip_directory import read_directory
from anycard.disk.source import StreamSource
from anycard.errors import FormatError
from anycard.formats import legacy, torch_zip
from anycard.formats.index import Index
from anycard.limits import DEFAULT, Limits
from anycard.pickles.machine import read_pickle
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex128, torch.complex64, torch.complex32, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip
BOTH = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def saved(value: Any, *, new: bool = True, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return out.getvalue()


def index(data: bytes, limits: Limits = DEFAULT) -> Index:
    source = StreamSource("test", io.BytesIO(data))
    return (torch_zip if data[:2] == b"PK" else legacy).read_index(source, limits)


def one(data: bytes) -> Any:
    def refuse(pid: object) -> object:
        raise FormatError("no persistent ids here")

    return read_pickle(data, persistent_load=refuse, limits=DEFAULT)[0]


def same(info: TensorInfo, tensor: torch.Tensor) -> bool:
    assert isinstance(info, TensorInfo)
    assert (f"torch.{info.dtype}", info.shape) == (str(tensor.dtype), tuple(tensor.shape))
    want = tensor.detach().contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy()
    have = np.ascontiguousarray(as_numpy(info, raw=True)).reshape(-1).view(np.uint8)
    return bool((want == have).all()) and want.size == have.size


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, new: bool) -> None:
    tensor = torch.arange(96, dtype=torch.uint8).view(dtype).reshape(2, -1) % 2 if dtype == torch.bool else (
        torch.arange(96, dtype=torch.uint8).view(dtype).reshape(2, -1)
    )  # fmt: skip
    assert same(index(saved({"w": tensor}, new=new)).tree["w"], tensor)


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols_and_views(protocol: int, new: bool) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    given = OrderedDict(
        base=base, row=base[2], t=base.t(), step=base[::2, 1::3], wide=base[:1].expand(4, 12), empty=base[:0],
        scalar=torch.tensor(3.5), p=torch.nn.Parameter(base.clone()), frozen=torch.nn.Parameter(base, False),
        conj=torch.randn(3, dtype=torch.complex64).conj(), neg=torch.randn(3, dtype=torch.complex64).conj().imag,
    )  # fmt: skip
    tree = index(saved(given, new=new, protocol=protocol)).tree
    assert isinstance(tree, OrderedDict)
    assert list(tree) == list(given)
    for name, tensor in given.items():
        assert same(tree[name], tensor), name
        assert tree[name].stride == tensor.stride(), name
    assert tree["row"].storage is tree["base"].storage is tree["frozen"].storage
    assert (tree["p"].parameter, tree["p"].requires_grad) == (True, True)
    assert (tree["frozen"].parameter, tree["frozen"].requires_grad) == (True, False)
    assert (tree["conj"].conj, tree["neg"].neg) == (True, True)


@BOTH
def test_training_checkpoint(new: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    given = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "best": 0.5, "tag": "é"}
    tree = index(saved(given, new=new)).tree
    assert (tree["epoch"], tree["best"], tree["tag"]) == (7, 0.5, "é")
    assert tree["model"]._metadata == model.state_dict()._metadata
    assert all(same(tree["model"][k], v) for k, v in model.state_dict().items())
    assert same(tree["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_whole_model_is_inert(new: bool) -> None:
    model = torch.nn.Linear(3, 4)
    tree = index(saved(model, new=new)).tree
    assert isinstance(tree, Inert)
    assert (tree.path, tree.called) == ("torch.nn.modules.linear.Linear", False)
    assert same(tree.state["_parameters"]["weight"], model.weight)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values(protocol: int) -> None:
    given = {
        "n": [0, 1, -1, 255, 65536, -(2**31), 2**63, -(2**90), 1.5, float("inf"), None, True, False, 1j],
        "s": ["", "a\nb", "é中😀", b"", b"\x00\xff", bytearray(b"xy")], "t": [(), (1,), (1, 2), (1, 2, 3), (1,) * 4],
        "set": {1, 2}, "frozen": frozenset("ab"), "many": {i: str(i) for i in range(2500)},
    }  # fmt: skip
    assert one(pickle.dumps(given, protocol)) == given
    assert one(pickle.dumps([Counter("aab"), defaultdict(list, a=[1])], protocol)) == [{"a": 2, "b": 1}, {"a": [1]}]
    twice = [1]
    twin = one(pickle.dumps([twice, twice], protocol))
    assert twin[0] is twin[1]
    loop: list[Any] = []
    loop.append(loop)
    read = one(pickle.dumps(loop, protocol))
    assert read[0] is read


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3)), np.arange(4, dtype=">i2"),
    np.array(True), np.zeros((0, 3), "f2"), np.arange(3) * 1j, np.arange(3, dtype="u8"),
    np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2), np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)[::-1],
], ids=str)  # fmt: skip
def test_numpy(array: Any, protocol: int) -> None:
    info = one(pickle.dumps({"a": array, "same": array}, protocol))["a"]
    assert isinstance(info, TensorInfo)
    assert info.shape == array.shape
    assert (as_numpy(info) == array).all()


def test_numpy_scalars_and_others() -> None:
    given = [np.float64(1.5), np.int32(-3), np.bool_(True), np.complex64(1j)]
    assert one(pickle.dumps(given, 2)) == [1.5, -3, True, 1j]
    assert [type(v) for v in one(pickle.dumps(given, 2))] == [float, int, bool, complex]
    one(pickle.dumps([np.array(["a", "b"]), np.array([{}], object), np.datetime64("2020-01-01")], 2))


@BOTH
def test_cut_short(new: bool) -> None:
    data = saved({"a": torch.arange(40.0), "b": [torch.ones(3, 3), "x"], "c": 3}, new=new)
    for size in range(0, len(data), 37):
        with pytest.raises(FormatError):
            index(data[:size])


@BOTH
def test_flipped_bytes_give_format_error_or_a_result(new: bool) -> None:
    data = saved({"a": torch.arange(4.0), "n": np.arange(3), "b": [torch.nn.Parameter(torch.ones(2, 2)), "x"]}, new=new)
    for at in range(0, min(len(data), 3000), 7):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(data)
            broken[at] ^= flip
            try:
                index(bytes(broken))
            except FormatError:
                continue


def test_mutated_pickles_give_format_error_or_a_result() -> None:
    given = {
        "a": np.arange(3),
        "o": OrderedDict(x=1),
        "s": {1, 2},
        "b": b"x",
        "f": 1.5,
        "c": np.float32(1),
        "t": (1, [2]),
    }
    for protocol in range(6):
        data = pickle.dumps(given, protocol)
        for at in range(len(data)):
            for value in b"\x00(.RbIesu\x81\x85\x94\xffctio2Q":
                try:
                    one(data[:at] + bytes([value]) + data[at + 1 :])
                except FormatError:
                    continue


@pytest.mark.parametrize("data", [
    b"", b".", b"0.", b"a.", b"h\x05.", b"(.", b"\x80\x07N.", b"\xfeN.", b"\x82\x01.", b"\x97.", b"\x95" + b"\xff" * 8,
    b"X\xff\xff\xff\x7fab.", b"X\x02\0\0\0\xff\xfe.", b"\x8b\xff\xff\xff\xff.", b"}]Ns.", b"cos\nsystem\nNb.",
    b"K\x01)R.", b"Inine\n.", b"cbuiltins\nint\n(]tR.", b"e.", b"(d", b"(K\x01d.", b"cx\n",
    b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.", b"cbuiltins\nbytes\n\x8a\x06\0\0\0\0\0\x10\x85R.",
    b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.", b"F1.x\n.", b"Sabc\n.",
], ids=repr)  # fmt: skip
def test_malformed(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        one(data)
    assert caught.value.offset is not None


def test_nothing_runs() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit",))

    held = one(pickle.dumps(Evil(), 2))
    assert isinstance(held, Inert)
    assert (held.path, held.called) == ("builtins.exec", True) or held.path == "__builtin__.exec"


@pytest.mark.parametrize(
    "tail", ["b'}' + deep + b'Ns.'", "b'(' + deep + b'\\x91.'", "b'c_codecs\\nencode\\n' + deep + b'R.'"]
)
def test_deep_nesting_is_no_crash(tail: str) -> None:
    code = (
        "from anycard.pickles.machine import read_pickle; from anycard.limits import DEFAULT\n"
        "from anycard.errors import FormatError\n"
        f"deep = b'N' + b'\\x85' * 2_000_000; data = {tail}\n"
        "try: read_pickle(data, persistent_load=id, limits=DEFAULT)\n"
        "except FormatError: print('format error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "format error\n"), done.stderr[-300:]


def test_bounded_names() -> None:
    data = b"".join(b"cm\nc%d\n0" % i for i in range(20)) + b"N."
    with pytest.raises(FormatError):
        read_pickle(data, persistent_load=id, limits=Limits(globals=10))


def rezip(data: bytes, change: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            for other, held in change(name, old.read(name)):
                new.writestr(other, held)
    return out.getvalue()


def test_zip_directory_against_the_standard_library() -> None:
    data = saved({"a": torch.arange(9), "b": torch.ones(3)})
    records = read_directory(StreamSource("t", io.BytesIO(data)), DEFAULT)
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        assert list(records) == held.namelist()
        for name, record in records.items():
            assert data[record.offset : record.offset + record.nbytes] == held.read(name)


def test_zip_variants() -> None:
    tensor = torch.arange(100.0)
    data = saved({"a": tensor})
    deflated = rezip(data, lambda n, b: [(n, b)], zipfile.ZIP_DEFLATED)
    assert same(index(deflated).tree["a"], tensor)
    assert index(
        rezip(data, lambda n, b: [(n, b), ("archive/.anycard.json", b'{"v": 1}')][: 1 + n.endswith("l")])
    ).mark == {"v": 1}
    assert (
        index(rezip(data, lambda n, b: [(n, b), ("archive/.anycard.json", b"{")][: 1 + n.endswith("l")])).mark is None
    )
    for change, text in (
        (lambda n, b: [] if "/data/" in n else [(n, b)], "no record"),
        (lambda n, b: [(n, b[:8] if "/data/" in n else b)], "should have"),
        (lambda n, b: [] if n.endswith("data.pkl") else [(n, b)], "no data.pkl"),
        (lambda n, b: [("p/.data/extern_modules", b"")] * n.endswith("data.pkl"), "package without"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=text):
            index(rezip(data, change))


def test_damaged_index_and_directory() -> None:
    data = bytearray(saved({"abc": torch.arange(100.0)}))
    data[data.find(b"abc")] ^= 1
    with pytest.raises(FormatError, match="CRC"):
        index(bytes(data))
    with pytest.raises(FormatError, match="cut short"):
        index(saved({"a": torch.ones(3)})[:-30])
    good = saved({"a": torch.ones(3)})
    twice = rezip(good, lambda n, b: [(n, b)])
    assert index(twice).tree["a"].shape == (3,)


def test_storage_claims() -> None:
    def rebuilt(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        pid = (
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ" + struct.pack("<i", numel) + b"tQ"
        )
        rest = pickle.dumps((offset, size, stride, False, OrderedDict()), 2)
        values = [pickle.dumps(v, 2)[2:-1] for v in (offset, size, stride, False)]
        assert rest
        return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"".join(values) + b"NtR."

    good = saved(torch.arange(4.0))
    swap = lambda p: rezip(good, lambda n, b: [(n, p if n.endswith("data.pkl") else b)])  # noqa: E731
    assert index(swap(rebuilt(4, 1, (3,), (1,)))).tree.start == 4
    for bad in ((5, 0, (1,), (1,)), (4, 2, (3,), (1,)), (4, 0, (2, 2), (1,)), (4, -1, (1,), (1,)), (-1, 0, (1,), (1,)),
                (4, 0, (1 << 40, 1 << 40), (0, 1)), (4, 0, (1,) * 300, (1,) * 300), (4, 0, (2,), (-1,))):  # fmt: skip
        with pytest.raises(FormatError):
            index(swap(rebuilt(*bad)))


def test_large_legacy_index_is_read_in_steps() -> None:
    given = {"text": ["x" * 1000 + str(i) for i in range(3000)], "w": torch.arange(5.0)}
    tree = index(saved(given, new=False), Limits(chunk_nbytes=1 << 16)).tree
    assert tree["text"] == given["text"]
    assert same(tree["w"], given["w"])
