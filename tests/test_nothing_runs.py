"""No file runs anything: audit hooks watch every verb on every hostile file, in one process of its own."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anycard
import bombs
from helpers import Small, quiet
from test_scan import ATTACKS

# Whatever a file would do shows up as an audit event, and is stopped there.
WATCH = """
import importlib, io, json, os, pkgutil, sys
out = os.fdopen(os.dup(1), "w")
import anycard, anycard.cli.main, numpy, ml_dtypes, blake3, zlib_ng, torch
from anycard.names.module_tree import tree_lines
for found in pkgutil.walk_packages(anycard.__path__, "anycard."):
    if not found.name.startswith(("anycard.matrix", "anycard.__main__")):
        importlib.import_module(found.name)
benign, slow, hostile = (json.loads(arg) for arg in sys.argv[1:])
VERBS = {
    "list": lambda path: listed(path), "scan": anycard.scan, "read": anycard.read, "load": anycard.load,
    "verify": anycard.verify,
}

def listed(path):
    with anycard.open(path) as ckpt:
        ckpt.tensors, ckpt.objects, ckpt.metadata, ckpt.wrappers, ckpt.state_dicts, list(tree_lines(ckpt.tree))
        for name in list(ckpt.tensors)[:4]:
            ckpt.numpy(name, raw=True)
        ckpt.fingerprint()

current, opened, events = None, set(), []
HARMLESS = {"ctypes.cdata", "ctypes.cdata/buffer", "ctypes.addressof",
            "ctypes.get_errno", "object.__getattr__", "object.__setattr__", "sys._getframe",
            "builtins.id", "array.__new__", "gc.get_referrers", "os.stat"}

def hook(event, args):
    if current is None or event in HARMLESS:
        return
    if event == "open" and args[0] == current:
        opened.add(current)
        return
    events.append([current, event, repr(args)[:200]])
    raise RuntimeError(f"{event} is not allowed while {current} is read")

def use(path):
    ends = {}
    for verb, call in list(VERBS.items())[: 2 if path in slow else None]:
        try:
            call(path)
            ends[verb] = "fine"
        except anycard.CheckpointError as error:
            ends[verb] = type(error).__name__
        except RuntimeError as error:
            ends[verb] = str(error)
    return ends

for path in benign:  # what Python and torch load on first use is there then
    use(path)
modules = set(sys.modules)
sys.addaudithook(hook)
results = {}
for path in hostile:
    current = path
    results[path] = use(path)
    current = None
new = sorted(set(sys.modules) - modules)
json.dump({"results": results, "events": events, "opened": len(opened), "new": new}, out)
"""


def absent_models() -> dict[str, bytes]:
    """Whole models of a package that is not there, in every form of pickle."""
    package = types.ModuleType("absent_package")
    package.Net = type("Net", (Small,), {"__module__": "absent_package"})  # type: ignore[attr-defined]
    sys.modules["absent_package"] = package
    try:
        model, made = package.Net(), {}
        for new in (True, False):
            file = io.BytesIO()
            with quiet():
                torch.save({"epoch": 1, "model": nn.DataParallel(model)}, file, _use_new_zipfile_serialization=new)
            made[f"absent {'zip' if new else 'legacy'}"] = file.getvalue()
        made["absent pickle"] = pickle.dumps(model)
        made["forgotten call"] = pickle.dumps(model.state_dict)
    finally:
        del sys.modules["absent_package"]
    return made


def hostile() -> dict[str, bytes]:
    files = {bomb.__name__: bomb() for bomb in (*bombs.REFUSED, *bombs.READ)}
    for name, attack in ATTACKS.items():
        files |= {
            f"{name}, plain": attack,
            f"{name}, zip": bombs.torch_zip(attack),
            f"{name}, gzip": gzip.compress(attack),
        }
        magic, protocol = (pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001))
        files[f"{name}, legacy"] = magic + protocol + pickle.dumps({"little_endian": True}, 2) + attack
        files[f"{name}, as keys"] = magic + protocol + pickle.dumps({"little_endian": True}, 2) + b"N." + attack
    return files | absent_models()


def written(folder: Path, files: dict[str, bytes]) -> list[str]:
    folder.mkdir()
    for index, data in enumerate(files.values()):
        (folder / f"{index}.pt").write_bytes(data)
    return [str(folder / f"{index}.pt") for index in range(len(files))]


def benign(folder: Path) -> list[str]:
    """One good file of each format that a hostile one may be taken for, and one that is none."""
    state: dict[str, Any] = {"w": torch.ones(2), "n": torch.arange(3).bfloat16()}
    folder.mkdir()
    anycard.save(state, folder / "a.pt")
    anycard.save(state, folder / "a.safetensors")
    anycard.save(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), folder / "whole.pt", whole=True)
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pkl").write_bytes(pickle.dumps(state))
    (folder / "a.gz").write_bytes(gzip.compress((folder / "a.pt").read_bytes()))
    (folder / "texts.pkl").write_bytes(pickle.dumps(["a"], 0))
    (folder / "none.pt").write_bytes(b"no checkpoint")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "a.pt", "a.pt")
    for name, data in absent_models().items():
        (folder / name).write_bytes(data)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.timeout(180)
def test_nothing_runs(tmp_path: Path) -> None:
    """Open, list, scan, read, load, verify: no import, no exec, no process, no socket, no file but the checkpoint."""
    files = hostile()
    paths = written(tmp_path / "hostile", files)
    slow = paths[: len(bombs.REFUSED) + len(bombs.READ)]  # they take what they may: open, list and scan will do
    args = [json.dumps(held) for held in (benign(tmp_path / "benign"), slow, paths)]
    command = [sys.executable, "-W", "ignore", "-c", WATCH, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    names = dict(zip(paths, files, strict=True))
    assert [[names[path], *rest] for path, *rest in report["events"]] == []
    assert (report["opened"], report["new"]) == (len(paths), [])
    ends = {names[path]: end for path, end in report["results"].items()}
    allowed = {"fine", "FormatError", "UntrustedError", "ChoiceError", "CheckpointError"}
    assert {name: end for name, end in ends.items() if not set(end.values()) <= allowed} == {}
    assert {end["scan"] for name, end in ends.items() if name in ATTACKS} <= {"fine"}
    for name in ("absent zip", "absent legacy", "absent pickle"):
        assert (ends[name]["read"], ends[name]["load"]) == ("fine", "UntrustedError")
