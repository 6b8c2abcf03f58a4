"""DCP folders as torch.distributed.checkpoint writes them: by one process, and by several over gloo."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import anycard
from anycard.disk.source import MemorySource
from anycard.formats.assembled import Chunk, Prover, assemble
from anycard.operations.fingerprinting import fingerprint
from anycard.tensors import Storage, TensorInfo, form_of
from helpers import assert_same, bits, filled, unchanged, weights
from test_folders_members import HOLDERS


def net() -> nn.Sequential:
    """Some layers, a batch norm's counter among them."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def saved(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    """A DCP folder written without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True, **options)
    return folder


RANKS = """
    import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor, Shard, Replicate
    rank, world, store, folder, kind = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    full = torch.load(store + ".full")
    places = {"rows": (Shard(0), Replicate()), "columns": (Replicate(), Shard(1)), "grid": (Shard(0), Shard(1)),
              "uneven": (Shard(0), Shard(0)), "last": (Shard(2), Shard(0)), "both": (Shard(1), Shard(1)),
              "whole": (Replicate(), Replicate()), "half": (Shard(1), Replicate()), "few": (Shard(0), Shard(0))}
    state = {"model": {n: distribute_tensor(t, mesh, places[n]) for n, t in full.items()}, "step": 7}
    if kind == "safetensors":
        writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
        dcp.save(state["model"], storage_writer=writer)
    else:
        dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()
"""


def full() -> dict[str, torch.Tensor]:
    """Tensors that ranks cut in every way."""
    make = torch.Generator().manual_seed(1)
    shapes = {"rows": (8, 5), "columns": (7, 12), "grid": (9, 10), "uneven": (5, 3), "last": (4, 3, 6),
              "both": (3, 16), "whole": (4, 4), "few": (2, 3)}  # fmt: skip
    made = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    return {**made, "half": torch.randn(6, 4, generator=make).bfloat16()}


def by_ranks(tmp_path: Path, want: dict[str, torch.Tensor], kind: str) -> Path:
    """A folder written by four processes."""
    torch.save(want, tmp_path / "store.full")
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANKS))
    folder = tmp_path / "ckpt"
    running = [
        subprocess.Popen([sys.executable, "-W", "ignore", script, str(r), "4", tmp_path / "store", folder, kind],
                         stderr=subprocess.PIPE)
        for r in range(4)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[1] for process in running]
    assert not any(process.returncode for process in running), said[0].decode()[-2000:]
    return folder


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_tensors_that_several_ranks_wrote(tmp_path: Path, kind: str) -> None:
    """Rows, columns, grids, uneven and empty shards, put together without a process group."""
    want = full()
    folder = by_ranks(tmp_path, want, kind)
    assert_same(anycard.read(folder), want)
    torch.save(want, tmp_path / "one.pt")
    assert anycard.diff(folder, tmp_path / "one.pt").equal
    assert fingerprint(folder) == fingerprint(tmp_path / "one.pt")
    anycard.convert(folder, tmp_path / "out.safetensors")
    assert_same(anycard.read(tmp_path / "out.safetensors"), want)
    archived = HOLDERS["gz.nemo"](tmp_path / "a.nemo", {f"w/{p.name}": p.read_bytes() for p in folder.iterdir()})
    assert_same(anycard.read(archived), want)
    with anycard.open(folder) as ckpt:
        assert ckpt.format == "DCP"
        if kind == "torch":
            assert ckpt.objects["step"] == 7
    if kind == "torch":
        report = anycard.verify(folder)
        assert report.ok and report.checked == len(want)


def test_one_process(tmp_path: Path) -> None:
    """Model, optimizer and plain data; the structure is the one that was saved."""
    model = filled(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    want = weights(model)
    folder = saved(tmp_path / "c", {"model": model.state_dict(), "optim": optimizer.state_dict(), "tags": ["a", 3]})
    assert_same(anycard.read(folder), want)
    with anycard.open(folder) as ckpt:
        assert ckpt.tree["tags"] == ["a", 3]
        assert ckpt.tree["optim"]["param_groups"][0]["lr"] == 0.25
        assert ckpt.objects["optim.param_groups.0.lr"] == 0.25
        assert ckpt.metadata["version"]
        got = torch.from_numpy(ckpt.numpy("optim.state.0.exp_avg"))
        assert bits(got) == bits(optimizer.state_dict()["state"][0]["exp_avg"])
    assert anycard.verify(folder).ok
    assert_same(weights(anycard.load(folder, net)), want)
    assert_same(anycard.read(tmp_path), want)  # a run's folder with the checkpoint's in it
    anycard.convert(folder, tmp_path / "all.pt")
    held = torch.load(tmp_path / "all.pt", weights_only=True)
    assert held["optim"]["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_of_the_folder_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The path of its metadata, or of a rank's file; an open file leads nowhere, and says so."""
    want = weights(filled(net()))
    folder = saved(tmp_path / "c", {"model": dict(want), "step": 3})
    assert_same(anycard.read(folder / name), want)
    assert_same(weights(anycard.load(folder / name, net)), want)
    monkeypatch.chdir(folder)
    assert_same(anycard.read(name), want)
    with (folder / ".metadata").open("rb") as file, pytest.raises(anycard.FormatError, match="give its path"):
        anycard.read(file)
    with pytest.raises(anycard.CheckpointError, match="member="):
        anycard.read(folder / name, member="x")


def test_an_entry_alone_is_a_torch_zip(tmp_path: Path) -> None:
    """Without metadata beside it, a file is what its bytes are."""
    torch.save({"a": torch.ones(3)}, tmp_path / "net.distcp")
    assert_same(anycard.read(tmp_path / "net.distcp"), {"a": torch.ones(3)})


def test_flat_state_dict_and_odd_tensors(tmp_path: Path) -> None:
    """Names with dots at the top, scalars, empty tensors, strides, every common dtype."""
    want = {
        "a.b": torch.randn(3, 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "view": torch.arange(20).reshape(4, 5)[1:, ::2],
        **{f"d.{d}": torch.ones(3, dtype=getattr(torch, d)) for d in ("bfloat16", "int8", "bool", "complex64")},
    }
    assert_same(anycard.read(saved(tmp_path / "c", dict(want))), want)


def test_safetensors_flavour_by_one_process(tmp_path: Path) -> None:
    """HuggingFaceStorageWriter by one rank writes an ordinary index and shards."""
    want = weights(filled(net()))
    saved(tmp_path / "c", dict(want), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "c")))
    assert_same(anycard.read(tmp_path / "c"), want)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """Before anything is loaded."""
    folder = saved(tmp_path / "c", {"model": filled(net()).state_dict()})
    (folder / "__0_0.distcp").unlink()
    model = filled(net(), 3)
    with unchanged(model), pytest.raises(anycard.FormatError, match=r"__0_0\.distcp"):
        anycard.load(folder, model)


def test_cut_short(tmp_path: Path) -> None:
    """Any cut of either file is FormatError."""
    folder = saved(tmp_path / "c", {"model": filled(net()).state_dict()})
    for name in (".metadata", "__0_0.distcp"):
        data = (folder / name).read_bytes()
        for end in (0, 1, 100, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:end])
            with pytest.raises(anycard.FormatError):
                anycard.read(folder)
        (folder / name).write_bytes(data)
    assert anycard.read(folder)


def test_damage_is_found(tmp_path: Path) -> None:
    """The records of a chunk have their CRC."""
    folder = saved(tmp_path / "c", {"model": filled(net()).state_dict()})
    with anycard.open(folder) as ckpt:
        info = ckpt.tensors["model.0.weight"]
        assert info.file == str(folder / "__0_0.distcp") and info.offset is not None
        at = info.offset
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[at] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    assert anycard.verify(folder).damaged == ("model.0.weight",)


def _entry(metadata: Metadata) -> Any:
    return next(v for k, v in metadata.storage_data.items() if k.fqn == "model.0.weight")


def _chunk(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.0.weight"].chunks[0]


def _empty(metadata: Metadata) -> Any:
    """A tensor without elements, in a million chunks."""
    made, chunk = metadata.state_dict_metadata["model.0.weight"], _chunk(metadata)
    made.size = chunk.sizes = torch.Size([0, 6])
    made.chunks = [chunk] * 1_000_000
    return made


LIES: dict[str, Callable[[Metadata], None]] = {
    "a path elsewhere": lambda m: setattr(_entry(m), "relative_path", "../c/__0_0.distcp"),
    "an absolute path": lambda m: setattr(_entry(m), "relative_path", "/etc/hostname"),
    "an offset beyond the file": lambda m: setattr(_entry(m), "offset", 1 << 40),
    "a negative offset": lambda m: setattr(_entry(m), "offset", -5),
    "a length beyond the file": lambda m: setattr(_entry(m), "length", 1 << 40),
    "overlapping entries": lambda m: setattr(_entry(m), "length", _entry(m).length + 1),
    "no number": lambda m: setattr(_entry(m), "offset", "3"),
    "a larger tensor": lambda m: setattr(m.state_dict_metadata["model.0.weight"], "size", torch.Size([6, 6])),
    "a chunk outside": lambda m: setattr(_chunk(m), "offsets", torch.Size([0, 0, 1])),
    "a larger chunk": lambda m: setattr(_chunk(m), "sizes", torch.Size([5, 7])),
    "a chunk twice": lambda m: m.state_dict_metadata["model.0.weight"].chunks.append(_chunk(m)),
    "a chunk a million times": lambda m: m.state_dict_metadata["model.0.weight"].chunks.extend([_chunk(m)] * 1_000_000),
    "no elements a million times": lambda m: m.state_dict_metadata.update({"model.0.weight": _empty(m)}),
    "one entry for two": lambda m: m.storage_data.update({MetadataIndex("model.2.weight", (0, 0)): _entry(m)}),
    "no chunks": lambda m: m.state_dict_metadata["model.0.weight"].chunks.clear(),
    "another dtype": lambda m: setattr(m.state_dict_metadata["model.0.weight"].properties, "dtype", torch.int64),
    "no entry": lambda m: m.storage_data.pop(MetadataIndex("model.0.weight", (0, 0))),
    "a value below a value": lambda m: m.planner_data.update({"model.0.weight": ("step", "x")}),
    "two values in one place": lambda m: m.planner_data.update({"model.0.weight": ("step",)}),
    "no path": lambda m: m.planner_data.update({"model.0.weight": 3.5}),
    "no metadata": lambda m: setattr(m, "state_dict_metadata", 3),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies(tmp_path: Path, lie: str) -> None:
    """FormatError that names a file, never another tensor."""
    folder = saved(tmp_path / "c", {"step": 5, "model": filled(net()).state_dict()})
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    LIES[lie](metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(anycard.FormatError) as caught:
        anycard.read(folder)
    assert caught.value.path and str(folder) in str(caught.value)


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """A folder of many ranks."""
    resource = pytest.importorskip("resource")
    want = {f"t{i}": torch.full((3,), float(i)) for i in range(400)}
    folder = saved(tmp_path / "c", dict(want))
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    data = (folder / "__0_0.distcp").read_bytes()
    for index, info in enumerate(metadata.storage_data.values()):
        (folder / f"__{index}_0.rank").write_bytes(data[info.offset : info.offset + info.length])
        info.relative_path, info.offset = f"__{index}_0.rank", 0
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/dev/fd").iterdir()))  # by the tests that ran before in this process, too
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 280, kept[1]))
    try:
        assert_same(anycard.read(folder), want)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)


def test_metadata_is_never_unpickled(tmp_path: Path) -> None:
    """What it would call is not called."""
    folder = saved(tmp_path / "c", {"model": filled(net()).state_dict()})
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(anycard.FormatError):
        anycard.read(folder)
    assert not (tmp_path / "ran").exists()


CUTS = [(1,), (7,), (2, 3), (5, 1), (3, 4, 2), (2, 1, 3), (1, 2, 2, 3)]


@pytest.mark.parametrize("shape", CUTS, ids=str)
@pytest.mark.parametrize("scale", [1, 4, 90])
def test_any_cut_and_any_range(shape: tuple[int, ...], scale: int) -> None:
    """Boxes of every kind against numpy: the whole, and pieces that begin and end anywhere."""
    rng = np.random.default_rng(len(shape) * scale)
    full_shape = tuple(size * scale if i == len(shape) - 1 else size + 1 for i, size in enumerate(shape))
    array = rng.integers(0, 1 << 30, full_shape).astype("<i4")
    chunks = []
    for index, (lows, sizes) in enumerate(_boxes(rng, full_shape)):
        part = array[tuple(slice(a, a + n) for a, n in zip(lows, sizes, strict=True))]
        order = np.ascontiguousarray(part) if index % 3 else np.asfortranarray(part)
        stride = tuple(step // 4 for step in order.strides)
        data = order.tobytes("A")
        storage = Storage(str(index), len(data), source=MemorySource("m", data), offset=0)
        if part.size:
            chunks.append(Chunk(lows, TensorInfo(form_of("int32", part.shape, stride), storage)))
    info = assemble("t", MemorySource("folder", b""), "int32", full_shape, chunks)
    want = array.tobytes()
    source = info.storage.source
    assert source is not None and source.size in (len(want), chunks[0].info.storage.nbytes)
    if len(chunks) > 1:
        assert source.read(0, len(want)) == want
        for start, end in np.sort(rng.integers(0, len(want) + 1, (20, 2)), axis=1).tolist():
            assert source.read(start, end - start) == want[start:end]


def _boxes(rng: np.random.Generator, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A box cut in two, again and again, along any dimension."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(7):
        at, size = boxes.pop(int(rng.integers(len(boxes))))
        d = int(rng.integers(len(shape)))
        cut = int(rng.integers(size[d] + 1))
        boxes.append((at, (*size[:d], cut, *size[d + 1 :])))
        boxes.append(((*at[:d], at[d] + cut, *at[d + 1 :]), (*size[:d], size[d] - cut, *size[d + 1 :])))
    return boxes


def test_overlapping_boxes_of_the_right_size() -> None:
    """As many elements as the tensor has do not make it whole."""
    storage = Storage("s", 8, source=MemorySource("m", b"\0" * 8), offset=0)
    chunks = [
        Chunk((0, 0), TensorInfo(form_of("int8", (2, 2)), storage)),
        Chunk((1, 0), TensorInfo(form_of("int8", (2, 2)), storage)),
    ]
    with pytest.raises(anycard.FormatError, match="overlap"):
        assemble("t", MemorySource("f", b""), "int8", (4, 2), chunks)


def test_chunks_that_claim_more_than_they_store() -> None:
    """By strides of 0: what is put together would be as large as they say."""
    storage = Storage("s", 1, source=MemorySource("m", b"x"), offset=0)
    half = TensorInfo(form_of("int8", (1, 1 << 40), (0, 0)), storage)
    with pytest.raises(anycard.FormatError, match="more elements than it stores"):
        assemble("t", MemorySource("f", b""), "int8", (2, 1 << 40), [Chunk((0, 0), half), Chunk((1, 0), half)])


def _crossed(rows: int, rank: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows, each cut elsewhere: no two pieces meet, and in the dimension that is cut most nearly all do."""
    rest = (0,) * rank, (1,) * rank
    left = [((0, i, *rest[0]), (1 + i, 1, *rest[1])) for i in range(rows)]
    return left + [((1 + i, i, *rest[0]), (rows - i, 1, *rest[1])) for i in range(rows)]


def test_boxes_that_take_long_to_compare() -> None:
    """Odd cuts of one tensor are proved; of tensor after tensor they are refused before they take a second."""
    prover = Prover()
    prover.prove("t", (451, 450, *[1] * 60), _crossed(450, 60))
    with pytest.raises(anycard.FormatError, match="endless"):
        prover.prove("t", (451, 450, *[1] * 60), _crossed(450, 60))
    mesh = Prover()
    for _ in range(30):  # however many tensors lie on a mesh of 16 x 16
        mesh.prove("t", (16, 16), [((a, b), (1, 1)) for a in range(16) for b in range(16)])


def test_an_entry_of_another_kind_is_named_in_few_words(tmp_path: Path) -> None:
    """Where a tensor should be lies a list that holds itself ten times over, many times: the message stays short."""
    folder = saved(tmp_path / "dcp", {"w": torch.ones(4)})
    held: Any = ["x"]
    for _ in range(12):
        held = [held] * 10
    torch.save(held, next(folder.glob("*.distcp")))
    size = next(folder.glob("*.distcp")).stat().st_size
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for entry in metadata.storage_data.values():
        entry.offset, entry.length = 0, size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(anycard.FormatError, match=r"not float32, \[4\]") as caught:
        anycard.open(folder)
    assert len(str(caught.value)) < 1_000
