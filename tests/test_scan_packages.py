"""Attacks on what counts as harmless: classes and sources of torch packages, bytes that are loaded within a pickle."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import anycard

EVIL = "os.system('true')"
CLASS = b"\x80\x02cm.mod\nC\n)\x81"


class Evil:
    """Runs when it is loaded."""

    def __reduce__(self) -> object:
        return os.system, ("true",)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def legacy(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def package(path: Path, source: str, pickled: bytes, name: str = "m/model.pkl", more: dict[str, bytes] | None = None):
    records = {
        name: pickled, "m/__init__.py": b"", "m/mod.py": source.encode(), ".data/version": b"6\n", "version": b"3\n",
        ".data/extern_modules": b"types\nos\ncollections\ntorch\nenum\n", ".data/python_version": b"3.11",
        "byteorder": b"little", **(more or {}),
    }  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in records.items():
            archive.writestr(f"arch/{inner}", data)


FUNCTIONS = f"""
def f(*a):
    import os
    {EVIL}
class C:
    def extend(self, x):
        f()
    def __setitem__(self, k, v):
        f()
    def __iter__(self):
        f()
"""
NAMESPACE = b"\x80\x02ctypes\nSimpleNamespace\n)\x81}" + text("__setstate__")
CALLED = {
    "a persistent id": (FUNCTIONS, b"\x80\x02(" + text("reduce_package") + b"K\x00cm.mod\nf\n)tQ."),
    "items": (FUNCTIONS, CLASS + b"(K\x01K\x02e."),
    "an item": (FUNCTIONS, CLASS + b"K\x01K\x02s."),
    "an argument": (FUNCTIONS, b"\x80\x02ccollections\ndeque\ncm.mod\nC\n)\x81\x85R."),
    "a state's hook": (FUNCTIONS, NAMESPACE + b"cm.mod\nf\nsb" + text("x") + b"b."),
    "an alias": ("import os\nclass C:\n    append = os.system\n", CLASS + text("true") + b"a."),
}


@pytest.mark.parametrize("how", CALLED)
def test_what_a_package_defines_is_not_called_in_another_way(tmp_path: Path, how: str) -> None:
    """A class that is made and given its state is harmless; whatever else a loader would do with it is not."""
    package(tmp_path / "a.pt", *CALLED[how])
    assert not anycard.scan(tmp_path / "a.pt").clean


def test_a_class_that_is_made_and_given_its_state_is_clean(tmp_path: Path) -> None:
    package(tmp_path / "a.pt", "class C:\n    def f(self):\n        return 1\n", CLASS + b"}" + text("a") + b"K\x01sb.")
    assert anycard.scan(tmp_path / "a.pt").clean


def test_a_source_called_like_python_s_own_makes_nothing_harmless(tmp_path: Path) -> None:
    """Plain `torch.load` reads data.pkl, and takes its names from Python."""
    pickled = NAMESPACE + b"cbuiltins\nexec\nsb" + text(f"import os; {EVIL}") + b"b."
    package(tmp_path / "a.pt", "", pickled, "data.pkl", {"builtins.py": b""})
    assert not anycard.scan(tmp_path / "a.pt").clean


MEMBERS = f"    A = 1\n    def __init__(self, v):\n        import os\n        {EVIL}\n"
RUN_ON_IMPORT = {
    "a lambda's default": f"import os\ng = lambda x={EVIL}: x\n",
    "a base's index": f"import os, typing\nT = typing.TypeVar('T')\nclass D(typing.Generic[({EVIL}, T)[1]]): pass\n",
    "two meanings": "from os import system as f\nif 0:\n    from re import compile as f\nf('true')\n",
    "members": f"import enum\nclass E(enum.Enum):\n{MEMBERS}",
    "members of a heir": f"import enum\nclass B(enum.Enum): pass\nclass E(B):\n{MEMBERS}",
    "what is caught": f"import os\ntry:\n    [][0]\nexcept ({EVIL}, IndexError)[1]: pass\n",
    "more than anyone writes": f"x = [{'0,' * 200_000}]\n",
}


@pytest.mark.parametrize("how", RUN_ON_IMPORT)
def test_a_source_that_runs_something_on_import(tmp_path: Path, how: str) -> None:
    package(tmp_path / "a.pt", RUN_ON_IMPORT[how] + "class C: pass\n", CLASS + b".")
    assert not anycard.scan(tmp_path / "a.pt").clean


def test_members_and_alternatives_that_do_nothing_are_clean(tmp_path: Path) -> None:
    source = (
        "import enum\ntry:\n    import numpy as np\nexcept ImportError:\n    np = None\n"
        "class E(enum.Enum):\n    A = 1\nclass C:\n    g = lambda self, x=1: x\n"
    )
    package(tmp_path / "a.pt", source, CLASS + b".")
    assert anycard.scan(tmp_path / "a.pt").clean


LOADS = b"ctorch.storage\n_load_from_bytes\n"


def within(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


ONCE = LOADS + within(legacy({})) + b"\x85R0"
BAD = within(legacy(Evil()))
DTYPE = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text(f"S{len(legacy(Evil()))}") + b"\x85R"
HANDED_ON = {
    "to another call": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + LOADS + b"ctorch\nTensor\n" + BAD + b"\x85NtR",
    "bytes that a call makes": LOADS + DTYPE + BAD + b"\x86R\x85R",
}


@pytest.mark.parametrize("how", HANDED_ON)
def test_one_nested_file_that_is_harmless_excuses_no_other(tmp_path: Path, how: str) -> None:
    """Whoever loads bytes within a pickle is told unless all the bytes were looked into."""
    (tmp_path / "a.pkl").write_bytes(b"\x80\x03" + ONCE + HANDED_ON[how] + b".")
    assert not anycard.scan(tmp_path / "a.pkl").clean


def test_nested_files_that_were_all_looked_into_are_clean(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(nn.Linear(2, 2).state_dict()))
    assert anycard.scan(tmp_path / "a.pkl").clean


class Exported(nn.Module):
    """Has code that TorchScript runs when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = 1

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return (self.a, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.a = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("change", ["spaces", "case"])
def test_torchscript_that_is_spelt_otherwise_is_found(tmp_path: Path, change: str) -> None:
    """TorchScript's reader takes more blanks, and names in any case."""
    torch.jit.save(torch.jit.script(Exported()), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in plain.namelist():
            data = plain.read(name)
            if change == "spaces":
                data = data.replace(b"def __setstate__", b"def  __setstate__")
            elif name.endswith(".py"):
                name = name[:-3] + ".PY"
            archive.writestr(name, data)
    assert not anycard.scan(tmp_path / "a.pt").clean


class Scaled(nn.Module):
    """Its constant begins like a pickle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(640) * torch.tensor(0.5)


@pytest.mark.filterwarnings("ignore")
def test_constants_that_begin_like_pickles_are_constants(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(Scaled(), torch.ones(2)), tmp_path / "a.pt")
    assert anycard.scan(tmp_path / "a.pt").clean


def test_the_header_of_a_numpy_file_is_bounded(tmp_path: Path) -> None:
    """A header that is longer than numpy's own ends at once, as unreadable."""
    header = b"'descr':" * 50_000
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\2\0" + struct.pack("<I", len(header)) + header)
    assert not anycard.scan(tmp_path / "a.npy").clean


class Sized(nn.Module):
    """Its sizes are expressions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x]) + x.shape[0] // 2


def exported(path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(Sized(), (torch.ones(4, 3),), dynamic_shapes=({0: batch},)), path)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_clean_until_sympy_is_given_more_than_sizes(tmp_path: Path) -> None:
    """`torch.export.load` gives the text of a size to sympy, which evaluates it; compiled code it opens."""
    exported(tmp_path / "a.pt2")
    assert anycard.scan(tmp_path / "a.pt2").clean
    for text in ("__import__('os').system('true')", "preview(x)", "Symbol(sympify('1'))", "x.f()", "[1][0]"):
        with zipfile.ZipFile(tmp_path / "a.pt2") as plain, zipfile.ZipFile(tmp_path / "b.pt2", "w") as archive:
            for name in plain.namelist():
                data = plain.read(name)
                if name.endswith("models/model.json"):
                    first = data.index(b"Symbol(")
                    end = data.index(b')"', first) + 1
                    data = data[:first] + text.encode() + data[end:]
                archive.writestr(name, data)
        assert not anycard.scan(tmp_path / "b.pt2").clean, text
    with zipfile.ZipFile(tmp_path / "a.pt2", "a") as archive:
        archive.writestr("archive/data/aotinductor/model/x.wrapper.so", b"\x7fELF")
    assert not anycard.scan(tmp_path / "a.pt2").clean


def array_of(value: object) -> bytes:
    file = io.BytesIO()
    held = np.empty(1, object)
    held[0] = value
    np.save(file, held, allow_pickle=True)
    return file.getvalue()


def test_members_that_only_python_finds_are_found(tmp_path: Path) -> None:
    """An end record that counts too few, and an array in the place of a storage: `numpy.load` reads both."""
    for name, records in {
        "count.npz": {"x.npy": array_of(1), "y.npy": array_of(Evil())},
        "raw.npz": {"data.pkl": pickle.dumps({}, 2), "data/0": array_of(Evil())},
    }.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for inner, data in records.items():
                archive.writestr(inner, data)
        if name == "count.npz":
            data = bytearray((tmp_path / name).read_bytes())
            struct.pack_into("<2H", data, data.rfind(b"PK\5\6") + 8, 1, 1)
            (tmp_path / name).write_bytes(data)
        report = anycard.scan(tmp_path / name)
        assert "posix.system" in {finding.name for finding in report.bad} or os.name == "nt"


def test_ids_that_torch_knows_behind_its_magic_number_hide_nothing(tmp_path: Path) -> None:
    """A legacy stream in protocol 0, under a name that says nothing."""
    stream = b"I119547037146038801333356\n.I1001\n.}.(S'module'\nNNNtQ0cos\nsystem\n(S'true'\ntR."
    (tmp_path / "weights").write_bytes(stream)
    assert {finding.name for finding in anycard.scan(tmp_path).bad} == {"os.system"}


def wrapped(dtype: bytes, nbytes: int) -> bytes:
    """joblib's word for an array whose bytes stand behind it."""
    state = (
        (b"subclass", b"cnumpy\nndarray\n"), (b"shape", b"K" + bytes([nbytes]) + b"\x85"), (b"order", text("C")),
        (b"dtype", dtype), (b"allow_mmap", b"\x89"),
    )  # fmt: skip
    pairs = b"".join(text(name.decode()) + value for name, value in state)
    return b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(" + pairs + b"ub"


BYTES = (
    b"cnumpy\ndtype\n" + text("i1") + b"\x89\x88\x87R(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
)
NAMESPACE_OF_ONE = b"cargparse\nNamespace\n" + text("i1") + b"\x85\x81}" + text("hasobject") + b"\x88sb"


@pytest.mark.parametrize("how", ["no dtype", "within a frame"])
def test_what_joblib_does_not_pass_over_is_no_array(tmp_path: Path, how: str) -> None:
    """An element that only looks like numpy's, and an array whose bytes joblib takes from behind its frame."""
    evil = b"0cos\nsystem\n" + text("true") + b"\x85RN"
    if how == "no dtype":
        evil = pickle.dumps(Evil(), 2)
        data = b"\x80\x02" + wrapped(NAMESPACE_OF_ONE, len(evil)) + evil + b"."
    else:
        frame = wrapped(BYTES, len(evil)) + evil
        data = b"\x80\x04\x95" + struct.pack("<Q", len(frame) + 1) + frame + b"." + b"N." * (len(evil) // 2)
    (tmp_path / "a.joblib").write_bytes(data)
    assert not anycard.scan(tmp_path / "a.joblib").clean
