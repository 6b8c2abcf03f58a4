"""`anycard scan`: what loading a file the ordinary way would run, told without running it."""

from __future__ import annotations

import argparse
import bz2
import datetime
import gzip
import io
import json
import lzma
import pathlib
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn

import anycard
from anycard.cli.main import cli

ATTACKS: dict[str, bytes] = {
    "reduce, protocol 0": b"cos\nsystem\n(S'true'\ntR.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "memoised names": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x04true\x85R.",
    "new object": b"\x80\x02csubprocess\nPopen\nX\x04\x00\x00\x00true\x85\x81.",
    "build on a class": b"\x80\x02ctorch.nn\nLinear\n}X\x07\x00\x00\x00forwardcos\nsystem\nsb.",
    "getattr chain": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR.",
    "hidden below a pop": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R0}.",
    "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0eprint.__self__\x93.",
    "an alias of a library": b"\x80\x02cnumpy.testing._private.utils\nrunstring\nX\x01\x00\x00\x00x}\x86R.",
    "a name that nobody knows": b"\x80\x02cinnocent.module\nhelper\n)R.",
    "stacked after a harmless one": pickle.dumps({"a": 1}) + b"cos\nsystem\n(S'true'\ntR.",
    "nested in a storage": b"\x80\x04ctorch.storage\n_load_from_bytes\nC\x1ccos\nsystem\n(S'true true'\ntR.\x85R.",
}  # fmt: skip


def scanned(path: Path, *args: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the command."""
    result = CliRunner().invoke(cli, ["scan", "--json", str(path), *args])
    return result.exit_code, json.loads(result.output)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_not_clean(tmp_path: Path, name: str) -> None:
    """Whatever the opcodes, a global outside of the closed set is told, and the exit status is 1."""
    (tmp_path / "a.pkl").write_bytes(ATTACKS[name])
    status, report = scanned(tmp_path / "a.pkl")
    assert status == 1
    assert not report["clean"]
    assert {f["kind"] for f in report["findings"]} & {"runs code", "unknown"}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/other.bin", "weird", "archive/constants.pkl"])
def test_attacks_in_any_record_are_found(tmp_path: Path, name: str, record: str) -> None:
    """In a zip, whatever the record is called."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/version", "3\n")
        file.writestr(record, ATTACKS[name])
    assert scanned(tmp_path / "a.pt")[0] == 1


def _usual(tmp: Path) -> dict[str, Callable[[], Path]]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    beside = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a/b")), "epoch": 3, "best": np.float64(0.5),
        "when": datetime.datetime(2020, 1, 2), "history": defaultdict(list, {"loss": [1.0]}), "rng": np.arange(3),
        "counts": Counter("aab"), "shape": torch.Size([1, 2]), "device": torch.device("cpu"), "odd": {1, 2},
        "order": OrderedDict(a=1), "bytes": b"\x00\xff", "slice": slice(1, 2),
    }  # fmt: skip
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), **beside}

    def plain(name: str, **options: Any) -> Path:
        torch.save(state, tmp / name, **options)
        return tmp / name

    def ours(name: str) -> Path:
        anycard.save(model, tmp / name)
        return tmp / name

    def pickled() -> Path:
        (tmp / "p.pkl").write_bytes(pickle.dumps(model.state_dict()))
        return tmp / "p.pkl"

    return {
        "torch zip": lambda: plain("a.pt"),
        "protocol 4": lambda: plain("b.pt", pickle_protocol=4),
        "legacy": lambda: plain("c.pt", _use_new_zipfile_serialization=False),
        "ours": lambda: ours("d.pth"),
        "safetensors": lambda: ours("e.safetensors"),
        "plain pickle of tensors": pickled,
    }


@pytest.mark.parametrize("kind", _usual(Path()))
def test_usual_checkpoints_are_clean(tmp_path: Path, kind: str) -> None:
    """Weights and training checkpoints of usual contents: exit 0."""
    status, report = scanned(_usual(tmp_path)[kind]())
    assert [f for f in report["findings"] if f["kind"] in ("unknown", "runs code")] == []
    assert report["unreadable"] == []
    assert status == 0


def test_a_whole_model_is_unknown_until_it_is_allowed(tmp_path: Path) -> None:
    """Classes are told one by one; --allow vouches for some."""
    anycard.save(nn.Linear(2, 2), tmp_path / "a.pt", whole=True)
    status, report = scanned(tmp_path / "a.pt")
    assert status == 1
    bad = [f["name"] for f in report["findings"] if f["kind"] == "unknown"]
    assert bad == ["torch.nn.modules.linear.Linear"]
    assert scanned(tmp_path / "a.pt", "--allow", bad[0])[0] == 0


def test_torchscript_without_code_that_runs_on_load_is_clean(tmp_path: Path) -> None:
    """A traced module's classes are the archive's own; `__setstate__` in its code would run."""
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "a.pt"))
    assert scanned(tmp_path / "a.pt")[0] == 0
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.writestr("a/code/__torch__/more.py", "def __setstate__(self, state):\n  pass\n")
    assert scanned(tmp_path / "a.pt")[0] == 1


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_what_cannot_be_followed_to_its_end_is_never_clean(tmp_path: Path, cut: int) -> None:
    """A truncated pickle, garbage, bytes after the last pickle: exit 2 where nothing bad was met before."""
    data = pickle.dumps({"a": [1, 2, 3], "b": "text"})
    for content in (data[:-cut], data + b"\x01\x02", b"\x80\x09nonsense", b"PK\x03\x04garbage"):
        (tmp_path / "a.pkl").write_bytes(content)
        status, report = scanned(tmp_path / "a.pkl")
        assert (status, report["clean"]) == (2, False)


@pytest.mark.parametrize("name", ["reduce, protocol 0", "stack global"])
def test_attacks_in_compressed_files_and_tars_are_found(tmp_path: Path, name: str) -> None:
    """gzip, bz2, xz, and a tar of files, one of which is bad."""
    for module in (gzip, bz2, lzma):
        (tmp_path / "a.pkl").write_bytes(module.compress(ATTACKS[name]))
        assert scanned(tmp_path / "a.pkl")[0] == 1
        (tmp_path / "a.pkl").write_bytes(module.compress(pickle.dumps({"a": 1})))
        assert scanned(tmp_path / "a.pkl")[0] == 0
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for member, data in (("good.pkl", pickle.dumps([1])), ("bad.pkl", ATTACKS[name])):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    status, report = scanned(tmp_path / "a.tar")
    assert status == 1
    assert {f["where"] for f in report["findings"]} == {"bad.pkl"}


def _like_safetensors(attack: bytes) -> bytes:
    """Text of four bytes, then the attack; as safetensors: a header of 1,112 bytes that begins with a brace."""
    return b"X\x04\0\0\0\0\0\0{0" + attack + bytes(1_200)


def _in_a_header(attack: bytes) -> bytes:
    """Valid safetensors: its length is the opcode and the size of a text that ends within its metadata."""
    start = b'{"__metadata__": {"a": "'
    held = start + b" " * (40 + 5 - 8 - len(start)) + attack + b'"}}'
    return b"X\x28" + bytes(6) + held.ljust(0x2858)


def _in_a_name(attack: bytes) -> bytes:
    """A tar whose first member is called like an attack."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(attack.decode()))
    return out.getvalue()


@pytest.mark.parametrize("hidden", [_like_safetensors, _in_a_header, _in_a_name])
def test_a_pickle_with_the_looks_of_another_format_is_found(tmp_path: Path, hidden: Callable[[bytes], bytes]) -> None:
    """`pickle.load` asks for no format: what it would import is told."""
    attack = b"cabsent\nname\n)R."
    if hidden is _in_a_header:  # of printable bytes and UTF-8: BINPUT takes what comes before a high opcode
        attack = b"q\xc2\x8c absent%26dq\xc2\x8c name%28dq\xc2\x93)R." % (0, 0)
    data = hidden(attack)
    if hidden is _in_a_header:
        (tmp_path / "a.safetensors").write_bytes(data)
        assert anycard.open(tmp_path / "a.safetensors").format == "safetensors"
    with pytest.raises(ModuleNotFoundError, match="absent"):
        pickle.loads(data)
    (tmp_path / "a.bin").write_bytes(data)
    status, report = scanned(tmp_path / "a.bin")
    assert status == 1 and any(finding["name"].startswith("absent") for finding in report["findings"])


@pytest.mark.parametrize("how", ["twice", "sparse of GNU", "sparse of pax", "beyond the end of numbers"])
def test_tars_with_odd_members(tmp_path: Path, how: str) -> None:
    """Both of one name are followed; what lies in holes is not read, and said."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for data in (ATTACKS["reduce, protocol 0"], pickle.dumps({"a": 1})):
            info = tarfile.TarInfo("a.pkl")
            info.size = len(data)
            info.type = b"S" if how == "sparse of GNU" else b"0"
            info.pax_headers = {"GNU.sparse.major": "1"} if how == "sparse of pax" else {}
            archive.addfile(info, io.BytesIO(data))
        if how == "beyond the end of numbers":
            info = tarfile.TarInfo("b")
            archive.addfile(info)
            info.size = 1 << 70
            out.write(info.tobuf(tarfile.GNU_FORMAT))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    status, report = scanned(tmp_path / "a.tar")
    assert status == (2 if "sparse" in how else 1)
    if "sparse" in how:
        assert "sparse" in report["unreadable"][0]
        with pytest.raises(anycard.FormatError, match="sparse"):
            anycard.open(tmp_path / "a.tar")
    else:
        assert report["findings"][0]["name"].endswith("system")


@pytest.mark.parametrize("nbytes", [93, 376, 640, 19280, 24184, 35615, 40056, 0x685A42])
def test_safetensors_whose_length_looks_like_a_magic_number(tmp_path: Path, nbytes: int) -> None:
    """lzma's, zlib's, pickle's, a zip's, gzip's and bz2's first bytes are lengths that headers have."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(nbytes)
    path = tmp_path / "x.safetensors"
    path.write_bytes(nbytes.to_bytes(8, "little") + header + bytes(4))
    assert anycard.open(path).numpy("w").tolist() == [0]
    assert scanned(path)[0] == 0


def test_folders_are_scanned_file_by_file(tmp_path: Path) -> None:
    """The finding says in which file."""
    anycard.save(nn.Linear(2, 2), tmp_path / "good.pth")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bad.bin").write_bytes(ATTACKS["stack global"])
    report = anycard.scan(tmp_path)
    assert [f.where for f in report.bad] == ["sub/bad.bin"]


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_clean(tmp_path: Path) -> None:
    """Its index is torch's own; its data files are archives one after the other, each looked into."""
    model = nn.Linear(3, 2)
    dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=str(tmp_path / "d"))
    assert anycard.scan(tmp_path / "d").clean
    data = next((tmp_path / "d").glob("*.distcp"))
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", ATTACKS["stack global"])
        data.write_bytes(data.read_bytes() + file.getvalue())
    assert anycard.scan(tmp_path / "d").bad


def test_scanning_runs_nothing(tmp_path: Path) -> None:
    """An audit hook sees no import, exec, process or other file while every attack is scanned."""
    for index, data in enumerate(ATTACKS.values()):
        (tmp_path / f"{index}.pkl").write_bytes(data)
    anycard.save({"w": torch.ones(1)}, tmp_path / "good.pt")
    code = """
import sys, anycard
folder = sys.argv[1]
anycard.scan(folder)  # once, so that what scan itself imports is there
seen = []
def hook(event, args):
    if event in ("import", "exec", "compile", "os.system", "subprocess.Popen", "os.exec", "pickle.find_class"):
        seen.append((event, args))
    if event == "open" and not str(args[0]).startswith(folder):
        seen.append((event, args))
sys.addaudithook(hook)
report = anycard.scan(folder)
assert report.bad and not seen, seen
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_a_torch_file_in_memory_is_a_file_to_scan(tmp_path: Path) -> None:
    """A torch file within a pickle is opened in its turn, and what it hides is found."""
    inner = io.BytesIO()
    torch.save({"x": torch.ones(1)}, inner)
    evil = inner.getvalue().replace(b"torch._utils\n_rebuild_tensor_v2", b"subprocess\n_args_from_interpre")
    assert evil != inner.getvalue()
    for data, statuses in ((evil, (1, 2)), (inner.getvalue(), (0,))):
        held = b"B" + len(data).to_bytes(4, "little") + data
        (tmp_path / "a.pkl").write_bytes(b"\x80\x04ctorch.storage\n_load_from_bytes\n" + held + b"\x85R.")
        assert scanned(tmp_path / "a.pkl")[0] in statuses
