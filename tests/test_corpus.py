"""Real checkpoints from other people's packages: right names, dtypes, shapes and bytes; and nothing runs.

`make test` fetches the small packages first, `make corpus` all of them; what is not in the cache is skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import anycard
from corpus.fetch import Row, rows, sha256

# The formats that anycard reads. A new format joins here: the tests below then hold its files against the
# truth instead of expecting a refusal (and `truth/` gets facts for its files where they are lacking).
READ = {"torch zip", "flat torch zip", "legacy stream", "safetensors", "plain pickle", "TorchScript", "torch package"}
WITHOUT_FACTS = {"torch package"}
BROKEN = {"nt_alias_attack.pkl"}  # its frame ends behind the file, so that Python refuses it too


def params(*, read: bool) -> list[Any]:
    """Rows of formats that are read, or that are not."""
    chosen = [row for row in rows() if readable(row) is read]
    return [pytest.param(row, id=f"{row.name}-{row.sha256[:4]}") for row in chosen]


def readable(row: Row) -> bool:
    """Its format is read, and the file is whole."""
    return row.kind in READ and Path(row.path).name not in BROKEN


def found(row: Row) -> Path:
    if not row.cached.is_file():
        pytest.skip(f"{row.package} is not in the cache: `make corpus` fetches it, where a package index is in reach")
    assert sha256(row.cached.read_bytes()) == row.sha256
    return row.cached


def facts_of(ckpt: anycard.Checkpoint) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return {
        name: (info.dtype, info.shape, hashlib.sha256(ckpt.numpy(name, raw=True).tobytes()).hexdigest())
        for name, info in ckpt.tensors.items()
    }


def test_table() -> None:
    """Each file that is read has its facts (packages have none), none is left over, paths stay below their package."""
    assert {row.truth for row in rows() if row.truth} == {
        p.name for p in (Path(__file__).parent / "corpus/truth").iterdir()
    }
    for row in rows():
        assert row.truth or row.kind not in READ or row.kind in WITHOUT_FACTS or row.tensors == "0"
        assert row.kind not in READ or not row.truth or len(row.facts()) == int(row.tensors)
        assert not Path(row.path).is_absolute() and ".." not in Path(row.path).parts


@pytest.mark.parametrize("row", params(read=True))
def test_tensors(row: Row) -> None:
    """Names, dtypes, shapes and bytes are those that were read from the raw bytes without anycard."""
    with anycard.open(found(row)) as ckpt:
        assert ckpt.format == row.kind.removeprefix("flat ")
        assert len(ckpt.tensors) == int(row.tensors)
        assert row.kind in WITHOUT_FACTS or facts_of(ckpt) == row.facts()
        assert not anycard.verify(row.cached).damaged


@pytest.mark.parametrize("row", params(read=True))
def test_weights(row: Row) -> None:
    """`weights` and `read` agree; a file without tensors is a ChoiceError."""
    path = found(row)
    with anycard.open(path) as ckpt:
        if row.tensors == "0":
            for call in (ckpt.weights, ckpt.fingerprint, lambda: anycard.read(path)):
                with pytest.raises(anycard.CheckpointError, match="no tensors") as caught:
                    call()
                assert isinstance(caught.value, ValueError)
            return
        weights = ckpt.weights()
        read = anycard.read(path)
        assert list(read) == list(weights)
        for name, info in weights.items():
            assert (str(read[name].dtype), tuple(read[name].shape)) == (f"torch.{info.dtype}", info.shape)
            assert read[name].device.type == "cpu"
            assert read[name].contiguous().numpy().tobytes() == ckpt.numpy(name, raw=True).tobytes()


@pytest.mark.parametrize("row", params(read=True))
@pytest.mark.timeout(10)
def test_there_and_back(row: Row, tmp_path: Path) -> None:
    """Converted to safetensors, to a torch zip and to safetensors again: the same bits, the same fingerprint."""
    path = found(row)
    with anycard.open(path) as ckpt:
        keys = [held.key for held in ckpt.state_dicts]
    if row.tensors == "0":
        with pytest.raises(anycard.CheckpointError, match="no tensors"):
            anycard.convert(path, tmp_path / "a.safetensors")
        assert not list(tmp_path.iterdir())
        return
    assert len(keys) == 1
    places = [tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors")]
    done = anycard.convert(path, places[0], key=keys[0])
    assert done.tensors > 0
    for source, target in itertools.pairwise(places):
        assert anycard.convert(source, target).left_behind == ()
    assert anycard.diff(path, places[2]).equal
    with anycard.open(path) as ckpt:
        assert {ckpt.fingerprint(), *(anycard.open(p).fingerprint() for p in places)} == {ckpt.fingerprint()}
    assert places[0].read_bytes() == places[2].read_bytes()


def test_convert_of_a_training_checkpoint_asks_for_a_key(tmp_path: Path) -> None:
    """Where something else holds tensors too (an optimizer), convert refuses with the list; `key=` picks."""
    row = next(row for row in rows() if row.name.startswith("chgnet/"))
    path = found(row)
    assert anycard.convert(path, tmp_path / "a.safetensors", key="model").tensors
    with pytest.raises(ValueError, match="optimizer"):
        anycard.convert(path, tmp_path / "b.safetensors")


SHOW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
sys.modules["torch"] = None
from anycard.cli.main import run
sys.argv = ["anycard", "show", "--json", sys.argv[1]]
run()
"""


@pytest.mark.parametrize("row", params(read=True))
def test_show_without_torch(row: Row) -> None:
    """`anycard show --json` lists exactly the tensors, in a process that has no torch."""
    command = [sys.executable, "-c", SHOW, str(found(row))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["format"] == row.kind.removeprefix("flat ")
    got = {name: (held["dtype"], tuple(held["shape"])) for name, held in shown["tensors"].items()}
    assert row.kind in WITHOUT_FACTS or got == {name: (dtype, shape) for name, (dtype, shape, _) in row.facts().items()}


# Runs in a process of its own. Whatever a file would do shows up as an audit event, and is stopped there.
NOTHING_RUNS = """
import importlib, json, os, pkgutil, sys
out = os.fdopen(os.dup(1), "w")
import anycard, anycard.cli.show, click.testing, numpy, ml_dtypes, blake3
for found in pkgutil.walk_packages(anycard.__path__, "anycard."):
    if not found.name.startswith(("anycard.torch", "anycard.matrix", "anycard.__main__")):
        importlib.import_module(found.name)
import anycard.torch.reading, anycard.torch.loading
paths = json.loads(sys.argv[1])

def use(path):
    for verb in (
        lambda: show(path), lambda: anycard.read(path), lambda: anycard.load(path), lambda: anycard.verify(path),
        lambda: anycard.diff(path, path),
    ):
        try:
            verb()
        except anycard.CheckpointError as error:
            yield type(error).__name__
        else:
            yield "fine"

def show(path):
    with anycard.open(path) as ckpt:
        for name in ckpt.tensors:
            ckpt.numpy(name, raw=True)
        ckpt.objects, ckpt.tree, ckpt.metadata, ckpt.fingerprint()

current = None
events, opened = [], set()
HARMLESS = {
    "ctypes.cdata", "ctypes.cdata/buffer", "ctypes.addressof", "object.__getattr__", "object.__setattr__",
    "sys._getframe", "builtins.id", "array.__new__",
}  # fmt: skip

def hook(event, args):
    if current is None or event in HARMLESS:
        return
    if event == "open" and args[0] == current:
        opened.add(current)
        return
    events.append([current, event, repr(args)[:200]])
    raise RuntimeError(f"{event} is not allowed while {current} is read")

for path in sys.argv[2:]:  # what Python and torch load on first use is there then
    list(use(path))
sys.addaudithook(hook)
results = {}
for path in paths:
    current = path
    try:
        results[path] = list(use(path))
    finally:
        current = None
json.dump({"results": results, "events": events, "opened": len(opened)}, out)
"""


def test_nothing_runs(tmp_path: Path) -> None:
    """Open, list, read, load, verify and diff: no import, no exec, no process, no file but the checkpoint."""
    held = [row for row in rows() if row.cached.is_file()]
    if not held:
        pytest.skip("the corpus is not in the cache: `make corpus` fetches it, where a package index is in reach")
    good, whole, bad = tmp_path / "good.pt", tmp_path / "whole.pt", tmp_path / "bad.pt"
    anycard.save({"w": torch.ones(2)}, good)
    anycard.save(torch.nn.Linear(2, 2), whole, whole=True)
    bad.write_bytes(b"no checkpoint")
    paths = json.dumps([str(row.cached) for row in held])
    command = [sys.executable, "-W", "ignore", "-c", NOTHING_RUNS, paths, str(good), str(whole), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert (report["events"], report["opened"]) == ([], len(held))
    for row in held:
        if not readable(row):
            assert set(report["results"][str(row.cached)]) == {"FormatError"}


@pytest.mark.parametrize("row", params(read=False))
def test_not_read_yet(row: Row) -> None:
    """A format that is not read yet is a FormatError that says what the file is; no warning, no other error."""
    path = found(row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(anycard.FormatError) as caught:
            anycard.open(path)
    assert str(path) in str(caught.value)
    what = {"plain pickle": "pickle", "torch package": "torch package"}
    assert what.get(row.kind, row.kind) in str(caught.value)
