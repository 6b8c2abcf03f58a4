"""DCP folders whose entries a stream extension has packed, and entries that are no plain tensors."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import StreamTransformExtension, ZStandard

import anycard
from helpers import assert_same, bits, filled, quiet, weights
from test_folders_dcp import net, saved

WANT = {**weights(filled(net())), "zeros": torch.zeros(300_000), "last": torch.rand(2, 3, 4, 4).contiguous(
    memory_format=torch.channels_last), "none": torch.empty(0, 3)}  # fmt: skip


class Packed(StreamTransformExtension):
    """Packs by a function once the entry is written; torch never reads it back here."""

    def __init__(self, name: str, pack: Callable[[bytes], bytes]) -> None:
        self.name, self.pack = name, pack

    @staticmethod
    def registry_name() -> str:
        return "stream.ours"

    @staticmethod
    def from_descriptor(version: str) -> Packed:
        raise NotImplementedError

    def get_descriptor(self) -> str:
        return f"stream.{self.name}/1"

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        raise NotImplementedError

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        pack = self.pack

        class Writer(io.BytesIO):
            def close(self) -> None:
                output.write(pack(self.getvalue()))
                output.close()
                super().close()

        return Writer()


def scrambled(data: bytes) -> bytes:
    """What nobody can read."""
    return bytes(byte ^ 0x5A for byte in data)


def packed(folder: Path, state: dict[str, Any], *steps: StreamTransformExtension) -> Path:
    """A folder whose entries went through the steps."""
    with quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, _extensions=list(steps)), no_dist=True)
    return folder


STEPS: dict[str, Callable[[], list[StreamTransformExtension]]] = {
    "gzip": lambda: [Packed("gzip", gzip.compress)],
    "xz": lambda: [Packed("mine", lzma.compress)],
    "gzip in xz": lambda: [Packed("outer", lzma.compress), Packed("inner", gzip.compress)],
    "zstd": lambda: [ZStandard()],
}


@pytest.mark.parametrize("kind", STEPS)
def test_packed_entries_are_read(tmp_path: Path, kind: str) -> None:
    """Whatever the extension calls itself: told by the bytes. Tensors and objects, every bit."""
    if kind == "zstd":
        pytest.importorskip("zstandard")
    folder = packed(tmp_path / "c", {"model": dict(WANT), "step": 7}, *STEPS[kind]())
    assert_same(anycard.read(folder), WANT)
    with anycard.open(folder) as ckpt:
        assert ckpt.objects["step"] == 7
        assert bits(torch.from_numpy(ckpt.numpy("model.last"))) == bits(WANT["last"])
    with quiet():
        assert_same(weights(anycard.load(folder, net, strict=False)), weights(filled(net())))
    anycard.convert(folder, tmp_path / "out.safetensors")
    assert_same(anycard.read(tmp_path / "out.safetensors"), WANT)
    report = anycard.verify(folder)
    assert report.ok and report.checked >= len(WANT) - 1


def test_nothing_is_inflated_before_it_is_read(tmp_path: Path) -> None:
    """Names, shapes and dtypes are had from the metadata; what is inflated is closed with the checkpoint."""
    folder = packed(tmp_path / "c", dict(WANT), *STEPS["gzip"]())
    spoilt = bytearray((folder / "__0_0.distcp").read_bytes())
    before = set(Path("/proc/self/fd").iterdir())
    with anycard.open(folder) as ckpt:
        assert {name: info.shape for name, info in ckpt.weights().items()} == {
            n: tuple(t.shape) for n, t in WANT.items()
        }
        ckpt.numpy("zeros")
    assert set(Path("/proc/self/fd").iterdir()) == before
    for info in pickle.loads((folder / ".metadata").read_bytes()).storage_data.values():
        spoilt[info.offset + info.length // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(spoilt)
    with anycard.open(folder) as ckpt:
        assert set(ckpt.weights()) == set(WANT)
    assert set(anycard.verify(folder).damaged) == set(WANT) - {"none"}


def test_damage_inside_is_found(tmp_path: Path) -> None:
    """A stream without a checksum holds a torch zip that has one."""

    def spoilt(data: bytes) -> bytes:
        at = data.rfind(WANT["0.weight"].numpy().tobytes())
        return lzma.compress(data[:at] + b"?" + data[at + 1 :] if at >= 0 else data, check=lzma.CHECK_NONE)

    folder = packed(tmp_path / "c", dict(WANT), Packed("x", spoilt))
    assert anycard.verify(folder).damaged == ("0.weight",)
    with pytest.raises(anycard.FormatError, match="CRC-32"):
        anycard.read(folder)


def test_what_is_packed_in_another_way_is_listed(tmp_path: Path) -> None:
    """With the extension's name as the reason; an object's place is not None."""
    folder = packed(tmp_path / "c", {"model": dict(WANT), "step": 7}, Packed("secret", scrambled))
    with anycard.open(folder) as ckpt:
        assert set(ckpt.weights()) == set(WANT)
        assert "stream.secret/1" in str(ckpt.objects["step"])
    with pytest.raises(anycard.FormatError, match=r"stream\.secret/1"):
        anycard.read(folder)


def test_entries_that_lie(tmp_path: Path) -> None:
    """Another tensor than promised; one that claims far more than lies there."""
    folder = packed(tmp_path / "c", dict(WANT), *STEPS["gzip"]())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entries = {index.fqn: index for index in metadata.storage_data}
    one, other = entries["0.bias"], entries["1.weight"]
    swapped = {**metadata.storage_data, one: metadata.storage_data[entries["last"]]}
    swapped.pop(entries["last"])
    metadata.storage_data = swapped
    metadata.state_dict_metadata.pop("last")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(anycard.FormatError, match="an entry holds"):
        anycard.read(folder)
    made = metadata.state_dict_metadata[other.fqn]
    made.size = made.chunks[0].sizes = torch.Size([1 << 40])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.read(folder)


def test_an_entry_that_inflates_without_end(tmp_path: Path) -> None:
    """No more than the tensor's size is made of it."""
    bomb = Packed("gzip", lambda data: gzip.compress(data + b"\0" * (80 << 20)))
    folder = packed(tmp_path / "c", {"a": torch.ones(3)}, bomb)
    with pytest.raises(anycard.FormatError, match="bomb"):
        anycard.read(folder)


def test_quantised_tensors_are_listed_by_their_parts(tmp_path: Path) -> None:
    """The one kind of tensor without plain memory that DCP writes."""
    with quiet():
        quantised = torch.quantize_per_tensor(torch.arange(12.0).reshape(3, 4), 0.5, 3, torch.quint8)
        folder = saved(tmp_path / "c", {"q": quantised, "a": torch.ones(2)})
    with anycard.open(folder) as ckpt:
        assert bits(torch.from_numpy(ckpt.numpy("q.int_repr"))) == bits(quantised.int_repr())
        assert ckpt.objects["q.scale"] == 0.5 and ckpt.objects["q.zero_point"] == 3


def test_an_entry_that_is_a_deflated_zip(tmp_path: Path) -> None:
    """A well-formed archive of another writer within the packing: read, and damage in it found."""

    def deflated(data: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return gzip.compress(out.getvalue())

    want = {"w": torch.arange(400.0).reshape(20, 20)}
    assert_same(anycard.read(packed(tmp_path / "dcp", want, Packed("gzip", deflated))), want)
