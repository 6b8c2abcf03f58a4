"""The legacy tar of torch before 0.1.10, written here by the layout that `torch.serialization.legacy_load` reads."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import anycard
from helpers import assert_same, quiet


class Pickler(pickle._Pickler):
    """Tensors by the address that the other members name them by."""

    def persistent_id(self, obj: Any) -> Any:
        return str(id(obj)) if isinstance(obj, torch.Tensor) else None


def tar(
    obj: Any, tensors: list[torch.Tensor], *, pax: bool = False, location: str = "cpu", views: bool = False
) -> bytes:
    """A legacy tar of an object; tensors that share a storage share it in the file."""
    storages: dict[int, torch.UntypedStorage] = {}
    entries = io.BytesIO()
    parts = []  # with `views`, every tensor but the first has a storage that is a part of another
    pickle.dump(len(tensors), entries, 2)
    for tensor in tensors:
        key = tensor.untyped_storage().data_ptr()
        storages[key] = tensor.untyped_storage()
        first = tensor.storage_offset()
        if views and len(parts) < len(tensors) - 1 and tensor is not tensors[0]:
            parts.append((len(parts) + 1, key, first, tensor.untyped_storage().size() // 4 - first))
            key, first = parts[-1][0], 0
        pickle.dump((id(tensor), key, torch.FloatTensor), entries, 2)
        rank = tensor.dim()
        entries.write(struct.pack(f"<i4x{2 * rank + 1}q", rank, *tensor.shape, *tensor.stride(), first))
    held = io.BytesIO()
    pickle.dump(len(storages), held, 2)
    for key, storage in storages.items():
        pickle.dump((key, location, torch.FloatStorage), held, 2)
        held.write(struct.pack("<q", len(storage) // 4) + bytes(storage))
    pickle.dump(parts, held, 2)
    objects = io.BytesIO()
    Pickler(objects, 2).dump(obj)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("sys_info", b""), ("pickle", objects), ("tensors", entries), ("storages", held)):
            info = tarfile.TarInfo(name)
            info.mtime = 1.5 if pax else 0
            value = data if isinstance(data, bytes) else data.getvalue()
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return file.getvalue()


def values() -> OrderedDict[str, torch.Tensor]:
    base = torch.arange(60.0)
    return OrderedDict(a=base.reshape(6, 10), b=base[5:17].reshape(3, 4).T, c=torch.rand(7), d=torch.tensor(3.5))


@pytest.mark.parametrize(("pax", "views"), [(False, False), (True, False), (False, True)])
def test_state_dict(pax: bool, views: bool, tmp_path: Path) -> None:
    """Views, shared storages, a scalar; torch reads the same."""
    held = values()
    path = tmp_path / "x.pth"
    path.write_bytes(tar({"state_dict": held, "epoch": 3}, list(held.values()), pax=pax, views=views))
    with quiet():
        assert_same(torch.load(path, weights_only=False)["state_dict"], held)
    assert_same(anycard.read(path), held)
    with anycard.open(path) as ckpt:
        assert (ckpt.format, ckpt.objects["epoch"]) == ("legacy tar", 3)
        assert ckpt.tensors["state_dict.a"].storage is ckpt.tensors["state_dict.b"].storage
    assert anycard.verify(path).ok
    anycard.convert(path, tmp_path / "y.pt", key="state_dict")
    assert_same(anycard.read(tmp_path / "y.pt"), held)


def test_tag_of_an_absent_card(tmp_path: Path) -> None:
    """The location is a tag, as everywhere."""
    held = values()
    (tmp_path / "x.pth").write_bytes(tar(held, list(held.values()), location="cuda:3"))
    assert_same(anycard.read(tmp_path / "x.pth"), held)


def test_damaged(tmp_path: Path) -> None:
    """Cut short or changed anywhere: an error of ours, or other values."""
    held = values()
    whole = tar(held, list(held.values()))
    path = tmp_path / "x.pth"
    for at in range(0, len(whole) - 1024, 37):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            path.write_bytes(data)
            with contextlib.suppress(anycard.CheckpointError), anycard.open(path) as ckpt:
                for name in ckpt.tensors:
                    ckpt.numpy(name, raw=True)


def test_another_tar(tmp_path: Path) -> None:
    """A tar without the members is no legacy file."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(anycard.FormatError):
        anycard.open(path)


def members(data: bytes) -> dict[str, bytes]:
    """A header and what it is of, by name."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: data[m.offset : m.offset_data + -(-m.size // 512) * 512] for m in archive}


def without_magic(header: bytes) -> bytes:
    """As tars were before POSIX, and the sum of its bytes."""
    held = header[:148] + b" " * 8 + header[156:257] + bytes(255)
    return held[:148] + b"%06o\0 " % sum(held) + held[156:] + header[512:]


def link(name: str, target: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info.tobuf(tarfile.USTAR_FORMAT)


def test_headers_before_posix(tmp_path: Path) -> None:
    """No `ustar`: the checksum tells; torch reads the same."""
    held = values()
    parts = members(tar(held, list(held.values())))
    (tmp_path / "x.pth").write_bytes(b"".join(map(without_magic, parts.values())) + bytes(1_024))
    assert b"ustar" not in (tmp_path / "x.pth").read_bytes()
    with quiet():
        assert_same(torch.load(tmp_path / "x.pth", weights_only=False), held)
    assert_same(anycard.read(tmp_path / "x.pth"), held)


def test_members_stand_anywhere_and_once(tmp_path: Path) -> None:
    """Behind any number of others; twice, or as a link to another, they are refused: torch takes the last."""
    held = values()
    parts = members(tar(held, list(held.values())))
    fillers = b"".join(link(f"{n}", "x", tarfile.SYMTYPE) for n in range(100))
    whole = fillers + b"".join(parts.values())
    (tmp_path / "x.pth").write_bytes(whole + bytes(1_024))
    assert_same(anycard.read(tmp_path / "x.pth"), held)
    for more in (parts["pickle"], link("pickle", "tensors", tarfile.LNKTYPE), link("storages", "x", tarfile.SYMTYPE)):
        (tmp_path / "x.pth").write_bytes(whole + more + bytes(1_024))
        with pytest.raises(anycard.FormatError, match="two members are called"):
            anycard.read(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(whole.replace(parts["pickle"], link("pickle", "x", tarfile.LNKTYPE)))
    with pytest.raises(anycard.FormatError, match="is a link"):
        anycard.read(tmp_path / "x.pth")
