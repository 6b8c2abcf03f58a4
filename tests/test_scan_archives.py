"""`anycard scan` looks into archives whatever their directories say, and into the code that they carry."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from torch.package import PackageExporter

from test_formats_tar import tar
from test_scan import scanned

EVIL = b"cos\nsystem\n(S'true'\ntR."


def bad_names(path: Path) -> tuple[int, list[str]]:
    status, report = scanned(path)
    return status, [f["name"] for f in report["findings"] if f["kind"] in ("unknown", "runs code")]


def archive_of(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def edited(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def no_directory(data: bytes) -> bytes:
    return data[: data.index(b"PK\1\2")]


def encrypted(data: bytes) -> bytes:
    """The bit that says so, in both headers."""
    data = edited(data, data.index(b"PK\3\4") + 6, b"\1\0")
    return edited(data, data.index(b"PK\1\2") + 8, b"\1\0")


def wrong_crc(data: bytes) -> bytes:
    data = edited(data, data.index(b"PK\3\4") + 14, b"\1\2\3\4")
    return edited(data, data.index(b"PK\1\2") + 16, b"\1\2\3\4")


def other_name_inside(data: bytes) -> bytes:
    """The directory calls the record what it is not called in its own header."""
    return edited(data, data.index(b"archive/data.pkl", data.index(b"PK\1\2")), b"archive/data.txt")


def twice(data: bytes) -> bytes:
    """A second record of the same name, which some readers take and some do not."""
    with zipfile.ZipFile(file := io.BytesIO(data), "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", EVIL)
    return file.getvalue()


def sizes_behind(data: bytes) -> bytes:
    """Sizes are left to a descriptor that is not there, and the directory is gone."""
    at = data.index(b"PK\3\4")
    return no_directory(edited(edited(data, at + 6, b"\x08\0"), at + 14, bytes(12)))


@pytest.mark.parametrize("damage", [no_directory, encrypted, wrong_crc, other_name_inside, twice, sizes_behind])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_whose_headers_lie_is_looked_into(
    tmp_path: Path, damage: Callable[[bytes], bytes], compression: int
) -> None:
    if compression and damage is wrong_crc:
        pytest.skip("a deflated record's bytes are not to be had past its checksum")
    data = damage(archive_of({"archive/data.pkl": EVIL, "archive/version": b"3\n"}, compression))
    (tmp_path / "a.pt").write_bytes(data)
    assert bad_names(tmp_path / "a.pt") == (1, ["os.system"])


def test_a_damaged_archive_of_harmless_pickles_is_still_not_clean(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(no_directory(archive_of({"archive/data.pkl": pickle.dumps({"a": 1}, 2)})))
    assert bad_names(tmp_path / "a.pt") == (2, [])


def test_records_that_overlap_end(tmp_path: Path) -> None:
    """Thousands of headers that each claim the rest of the file."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packed.compress(bytes(32 << 20)) + packed.flush()
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, 1 << 20, 1 << 30, 5, 0) + b"a.pkl"
    (tmp_path / "a.pt").write_bytes(header * 3000 + bomb)
    assert bad_names(tmp_path / "a.pt")[0] == 2


@pytest.mark.parametrize("name", ["archive/extra/notes.json", "archive/anything", "readme.md"])
def test_a_pickle_under_any_name_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pt").write_bytes(archive_of({"archive/data.pkl": pickle.dumps({}, 2), name: EVIL}))
    assert bad_names(tmp_path / "a.pt") == (1, ["os.system"])


def test_text_that_begins_like_a_pickle_is_text(tmp_path: Path) -> None:
    texts = {"archive/a.txt": b"copyright 2026\nall of us\n", "archive/b.md": b"(see below)", "c.json": b"}"}
    (tmp_path / "a.pt").write_bytes(archive_of({"archive/data.pkl": pickle.dumps({}, 2), **texts}))
    assert bad_names(tmp_path / "a.pt") == (0, [])


def test_a_frame_that_is_too_long_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04\x95\xff\0\0\0\0\0\0\0\x8c\x02nt\x8c\x06system\x93\x8c\x01x\x85R.")
    assert bad_names(tmp_path / "a.pkl") == (1, ["nt.system"])


def test_a_legacy_tar_is_followed(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    (tmp_path / "a.pt").write_bytes(tar({"a": weight}, [weight]))
    assert bad_names(tmp_path / "a.pt") == (0, [])


def test_an_attack_in_a_legacy_tar_is_found(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    (tmp_path / "a.pt").write_bytes(tar({"a": weight, "b": _Evil()}, [weight]))
    assert bad_names(tmp_path / "a.pt") == (1, ["builtins.print"])


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("no",)


@pytest.mark.parametrize("compress", [0, 3])
def test_joblib_arrays_are_followed(tmp_path: Path, compress: int) -> None:
    joblib.dump({"w": np.arange(12.0).reshape(3, 4), "b": np.arange(3)}, tmp_path / "a.joblib", compress=compress)
    assert bad_names(tmp_path / "a.joblib") == (0, [])


def test_objects_in_a_joblib_array_are_followed(tmp_path: Path) -> None:
    joblib.dump({"w": np.array([_Evil()], dtype=object)}, tmp_path / "a.joblib")
    assert bad_names(tmp_path / "a.joblib") == (1, ["builtins.print"])


HARMLESS = '''
"""Says what it is."""
from __future__ import annotations
import math
import os
from typing import List, Optional
import torch
import torch.nn.functional as F
from torch import nn
from helpers import Helper

__all__ = ["Net"]
torch.set_grad_enabled(False)
SIZES: List[int] = [1, 2, 3]
ROOT = math.sqrt(2.0)
if ROOT:
    LIMIT = -1

class Block(nn.Module):
    """A block."""
    count = 3
    def __init__(self, width: int = 4, inner: Optional[Helper] = None) -> None:
        super().__init__()
        self.path = os.getcwd()
    @property
    def size(self) -> int:
        return eval("1")
    @torch.no_grad()
    def forward(self, x):
        return F.relu(x)

class Net(Block):
    pass
'''
RUNS = {
    "a call": "import os\nos.system('true')",
    "a call of eval": "eval('1')",
    "an import that does something": "import antigravity",
    "a state setter": "class Net:\n    def __setstate__(self, s): pass",
    "a state setter by assignment": "class Net:\n    __setstate__ = print",
    "a decorator": "import os\n@os.system\nclass Net: pass",
    "a decorator under another name": "from os import system as dataclass\n@dataclass\nclass Net: pass",
    "a default": "import os\ndef f(x=os.system('true')): pass",
    "an annotation": "def f(x: exec('1')): pass",
    "a metaclass": "class Net(metaclass=print): pass",
    "a base that is computed": "class Net(print()): pass",
    "a base of another kind": "import pickle\nclass Net(pickle.Unpickler): pass",
    "something replaced": "import torch, os\ntorch.load = os.system",
    "a loop": "for i in range(9): pass",
    "a comprehension": "x = [print(i) for i in range(3)]",
    "a hidden class": "x = ().__class__.__bases__",
    "a module of its own in torch's name": "import torch\ntorch.set_num_threads(1)",
    "a module's own getattr": "def __getattr__(name): pass",
    "no Python": "class",
}


def packaged(path: Path, source: str, more: dict[str, str] | None = None) -> None:
    """A package of an object of class `model.Net`, made of sources as they are."""
    with PackageExporter(str(path)) as exporter:
        exporter.extern(["torch.**", "math", "os"])
        exporter.save_pickle("weights", "state.pkl", {"a": 1.0})
        exporter.save_text("notes", "readme.txt", "hello")
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/model.py", source)
        for name, code in (more or {}).items():
            archive.writestr(f"{root}/{name}.py", code)
        archive.writestr(f"{root}/net/net.pkl", b"\x80\x02cmodel\nNet\n)\x81}X\1\0\0\0aK\1sb.")


def test_a_package_whose_sources_only_define_is_clean(tmp_path: Path) -> None:
    packaged(tmp_path / "a.pt", HARMLESS, {"helpers": "class Helper:\n    pass"})
    assert bad_names(tmp_path / "a.pt") == (0, [])


@pytest.mark.parametrize("name", RUNS)
def test_a_package_whose_sources_do_more_is_not(tmp_path: Path, name: str) -> None:
    more = {"torch": "def set_num_threads(n): pass"} if "torch's name" in name else {}
    packaged(tmp_path / "a.pt", RUNS[name] + "\nclass Net: pass" * (name != "no Python"), more)
    status, names = bad_names(tmp_path / "a.pt")
    assert status == 1
    assert any(found.startswith("Python source: ") for found in names)


def test_a_class_of_a_package_that_is_called_is_not_clean(tmp_path: Path) -> None:
    """`Net()` would run `__init__`, which nothing looked into."""
    packaged(tmp_path / "a.pt", HARMLESS, {"helpers": "class Helper:\n    pass"})
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/net/called.pkl", b"\x80\x02cmodel\nNet\n)R.")
    assert bad_names(tmp_path / "a.pt") == (1, ["model.Net"])


def test_sources_beside_torchscript_do_not_pass_for_it(tmp_path: Path) -> None:
    packaged(tmp_path / "a.pt", RUNS["a call"] + "\nclass Net: pass")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/.data/ts_code/0/constants.pkl", pickle.dumps((), 2))
    assert bad_names(tmp_path / "a.pt")[0] == 1


def test_objects_in_numpy_files_are_followed(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.arange(3.0))
    np.save(tmp_path / "bad.npy", np.array([_Evil()], dtype=object))
    np.savez(tmp_path / "bad.npz", a=np.arange(3.0), b=np.array([_Evil()], dtype=object))
    assert bad_names(tmp_path / "good.npy") == (0, [])
    assert bad_names(tmp_path / "bad.npy") == (1, ["builtins.print"])
    assert bad_names(tmp_path / "bad.npz") == (1, ["builtins.print"])


def test_entries_of_dcp_that_are_packed_in_an_unknown_way_are_not_clean(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(bytes(byte ^ 0x5A for byte in archive_of({"archive/data.pkl": EVIL})))
    assert bad_names(tmp_path) == (2, [])


@pytest.mark.parametrize("where", [".data/ts_code/0", "elsewhere"])
def test_a_package_whose_module_is_called_like_torchscript_is_no_torchscript(tmp_path: Path, where: str) -> None:
    """Its function would run: the sources only define it, and TorchScript's names are those of another folder."""
    packaged(
        tmp_path / "a.pt", HARMLESS, {"helpers": "class Helper:\n    pass", "__torch__/evil": "def f(): exec('1')"}
    )
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{where}/constants.pkl", pickle.dumps((), 2))
        archive.writestr(f"{root}/net/called.pkl", b"\x80\x02c__torch__.evil\nf\n)R.")
    assert bad_names(tmp_path / "a.pt") == (1, ["__torch__.evil.f"])


def test_a_call_before_a_member_breaks_off_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(archive_of({"archive/data.pkl": pickle.dumps({}, 2), "net": b"cmodel\nf\n)R\xff"}))
    assert bad_names(tmp_path / "a.pt") == (1, ["model.f"])
