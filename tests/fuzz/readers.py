"""The readers that are fuzzed, and small valid files for each, made by real libraries as the tests make them.

python tests/fuzz/readers.py FOLDER     # FOLDER/READER/seeds/…
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pickle
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Make = Callable[[Path], Iterator[bytes]]
_LARGEST = 60_000  # bytes of a seed: mutations of large files are slow, and mostly of tensors' bytes


class Reader(NamedTuple):
    """A reader.

    Attributes:
        seeds: Makes its valid files, in a folder to work in.
        folder: What it reads is a folder; inputs are the zip of one.
    """

    seeds: Make
    folder: bool = False


def _torch_zip(work: Path) -> Iterator[bytes]:
    import numpy as np
    import torch
    from torch import nn

    import bombs
    from test_formats_tensors import kinds, saved
    from test_mutations import SEEDS
    from test_odd_zips import big_endian, with_offset_in_zip64_field

    yield from (data for data in SEEDS if data.startswith(b"PK"))
    yield from (saved({"x": value}).getvalue() for value, _ in kinds().values())
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(1, 1)))
    yield from (saved(value).getvalue() for value in (wrapped, {"model": wrapped.state_dict(), "epoch": 1}))
    odd = torch.ones(2, 3, dtype=torch.complex64).conj()
    yield saved(
        {
            "conj": odd,
            "neg": torch.ones(2, dtype=torch.complex64).conj().imag,
            "t": torch.ones(2, 3).T,
            "e": torch.ones(1).expand(3),
        }
    ).getvalue()
    yield from (with_offset_in_zip64_field(), big_endian(np.arange(9, dtype=">f4")))
    yield from (data for bomb in bombs.REFUSED if len(data := bomb()) < 4_000 and data[:2] == b"PK")


def _legacy_stream(work: Path) -> Iterator[bytes]:
    import bombs
    from test_mutations import SEEDS

    yield from (data for data in SEEDS if not data.startswith(b"PK"))
    yield from (data for bomb in bombs.REFUSED if len(data := bomb()) < 4_000 and data[:2] != b"PK")


def _legacy_tar(work: Path) -> Iterator[bytes]:
    from test_formats_tar import tar, values

    held = values()
    for options in ({}, {"pax": True}, {"views": True}):
        yield tar({"state_dict": held, "epoch": 3}, list(held.values()), **options)


def _plain_pickle(work: Path) -> Iterator[bytes]:
    import cloudpickle
    import joblib
    import numpy as np
    import torch

    from test_mutations import PICKLES, Odd

    held = {"w": torch.arange(6.0), "a": np.arange(3.0), "o": Odd(), "f": np.asfortranarray(np.ones((2, 3), ">f4"))}
    yield from PICKLES
    yield from (pickle.dumps(held, protocol) for protocol in range(6))
    yield cloudpickle.dumps({"w": torch.arange(6.0), "call": lambda: None})
    for compress in (0, ("zlib", 3), ("gzip", 3), ("bz2", 3), ("xz", 3)):
        out = io.BytesIO()
        joblib.dump({**held, "text": np.array(["a", "b"]), "any": np.array([{}, None], object)}, out, compress)
        yield out.getvalue()
    yield from (pack(pickle.dumps(held)) for pack in (gzip.compress, zlib.compress, bz2.compress, lzma.compress))


def _torchscript(work: Path) -> Iterator[bytes]:
    import torch

    from test_formats_archives import Net, script

    for how in ("script", "trace"):
        torch.jit.save(script(Net(), how), work / how)
        yield (work / how).read_bytes()


def _package(work: Path) -> Iterator[bytes]:
    import torch
    from torch import nn

    from test_formats_archives import Net, packaged, script

    torch.package.package_exporter._gate_torchscript_serialization = False
    packaged(work / "script", model={"net": script(Net(), "script")})
    yield (work / "script").read_bytes()
    packaged(work / "one", model=nn.Linear(2, 3))
    packaged(work / "two", one=nn.Linear(2, 3), two=nn.Linear(2, 2).state_dict())
    yield from ((work / name).read_bytes() for name in ("one", "two"))


def _export(work: Path) -> Iterator[bytes]:
    import torch
    from torch import nn

    from test_formats_archives import exported, old_export

    torch.export.save(exported(nn.Linear(4, 2)), work / "x.pt2")
    old_export(work / "old.pt2", nn.Linear(4, 2))
    yield from ((work / name).read_bytes() for name in ("x.pt2", "old.pt2"))


def _safetensors(work: Path) -> Iterator[bytes]:
    import torch
    from safetensors.torch import save

    import anycard

    held = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "h": torch.ones(3, dtype=torch.bfloat16)}
    yield save(held)
    yield save(held, {"format": "pt", "note": "x"})
    anycard.save({**held, "tied": held["w"]}, work / "ours.safetensors")
    yield (work / "ours.safetensors").read_bytes()


def _zip_of(folder: Path) -> bytes:
    """A folder as one input."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder).as_posix())
    return out.getvalue()


def _shards(work: Path) -> Iterator[bytes]:
    from helpers import filled, weights
    from test_folders_shards import net, sharded

    for safe in (True, False):
        index = sharded(work / str(safe), weights(filled(net())), safe)
        yield _zip_of(index.parent)
        index.unlink()
        yield _zip_of(index.parent)


def _dcp(work: Path) -> Iterator[bytes]:
    import torch

    from test_folders_dcp import saved

    flat = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    yield _zip_of(saved(work / "flat", dict(flat)))
    yield _zip_of(saved(work / "deep", {"model": flat, "step": 7, "list": [{"a": torch.ones(2)}]}))
    yield _zip_of(_chunks(work / "chunks", flat["w"]))
    yield _zip_of(_ranks(work / "ranks", flat["w"]))


def _chunks(folder: Path, whole: Any) -> Path:
    """A tensor in two chunks, as two processes would have written it."""
    import torch
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from test_folders_dcp import saved

    saved(folder, {"w": whole[:1].clone(), "v": whole[1:].clone()})
    held = pickle.loads((folder / ".metadata").read_bytes())
    first, second = held.state_dict_metadata["w"], held.state_dict_metadata.pop("v")
    first.size, second.chunks[0].offsets = whole.shape, torch.Size([1, 0])
    first.chunks += second.chunks
    place = next(key for key in held.storage_data if key.fqn == "v")
    held.storage_data[MetadataIndex("w", torch.Size([1, 0]))] = held.storage_data.pop(place)
    (folder / ".metadata").write_bytes(pickle.dumps(held))
    return folder


def _ranks(folder: Path, whole: Any) -> Path:
    """The same in DCP's flavour of safetensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    for rank in range(2):
        where = json.dumps({"w": {"saved_offsets": [rank, 0]}})
        name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file({"w": whole[rank : rank + 1].clone()}, folder / name, {"DCP_SHARDING_INFO": where})
    return folder


def _holders(work: Path) -> Iterator[bytes]:
    from safetensors.torch import save

    from test_folders_members import HOLDERS, LONG, WANT, packed

    files = {"notes.txt": b"x", "net.pt": packed(WANT), "optimizer.pt": packed({"state": {}}, True)}
    few = {LONG: save(WANT)}
    for name, make in HOLDERS.items():
        yield make(work / name, files).read_bytes()
        yield make(work / f"few {name}", few).read_bytes()
    yield from (pack(packed(WANT)) for pack in (gzip.compress, bz2.compress, lzma.compress))


def _folders(work: Path) -> Iterator[bytes]:
    from test_folders_members import WANT, packed
    from test_folders_zero import zero_folder

    yield from (_zip_of(zero_folder(work / f"zero{stage}", stage)) for stage in (2, 3))
    with zipfile.ZipFile(io.BytesIO(packed(WANT))) as archive:
        archive.extractall(work / "unpacked")
    yield _zip_of(work / "unpacked" / "archive")
    (work / "one").mkdir()
    (work / "one" / "net.pt").write_bytes(packed(WANT))
    yield _zip_of(work / "one")


READERS = {
    "torch zip": Reader(_torch_zip),
    "legacy stream": Reader(_legacy_stream),
    "legacy tar": Reader(_legacy_tar),
    "plain pickle": Reader(_plain_pickle),
    "TorchScript": Reader(_torchscript),
    "torch package": Reader(_package),
    "torch export": Reader(_export),
    "safetensors": Reader(_safetensors),
    "shards": Reader(_shards, folder=True),
    "DCP": Reader(_dcp, folder=True),
    "holders": Reader(_holders),
    "other folders": Reader(_folders, folder=True),
}


def main(home: Path) -> None:
    """Write every reader's seeds."""
    for name, reader in READERS.items():
        seeds = home / name / "seeds"
        seeds.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(sys.stderr):
            for number, data in enumerate(reader.seeds(Path(work))):
                if len(data) < _LARGEST:
                    (seeds / f"{number:03}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
