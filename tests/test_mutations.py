"""Anything at all: good files with a few bytes changed, and opcodes in any order. A result or a FormatError."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anycard.checkpoint import Checkpoint
from anycard.disk.source import StreamSource
from anycard.errors import CheckpointError, FormatError
from anycard.formats.index import Index
from anycard.formats.registry import read_index
from anycard.limits import DEFAULT
from anycard.pickles.machine import read_pickle
from bombs import torch_zip
from pickle_grammar import expression, opcode


def saved(value: Any, *, new: bool = True, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return out.getvalue()


def listed(found: Index) -> None:
    """Everything that listing touches."""
    ckpt = Checkpoint(found.source, found)
    for look in (lambda: ckpt.tensors, lambda: ckpt.objects, ckpt.weights, lambda: ckpt.wrappers, lambda: repr(ckpt)):
        try:
            look()
        except CheckpointError:
            continue


def opened(data: bytes) -> None:
    """Open and list: a result or a FormatError that says where."""
    try:
        found = index(data)
    except FormatError as error:
        if error.offset is None and "which is not read yet" not in str(error) and "no torch zip" not in str(error):
            raise AssertionError("no offset") from error
        return
    listed(found)


def index(data: bytes) -> Index:
    return read_index(StreamSource("test", io.BytesIO(data)))


def rezip(data: bytes, change: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            for other, held in change(name, old.read(name)):
                new.writestr(other, held)
    return out.getvalue()


class Odd:
    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(2))


def seeds() -> list[bytes]:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    held = {"model": model.state_dict(), "n": np.arange(3), "s": {1, "a"}, "t": (1, [2.5, None]), "o": Odd(), "b": b"x"}
    made = [saved(held, new=new, protocol=protocol) for new in (True, False) for protocol in (2, 4)]
    made.append(saved(model, new=True))
    made.append(rezip(made[0], lambda n, b: [(n, b)], zipfile.ZIP_DEFLATED))
    made.append(saved({"w": torch.ones(2, dtype=torch.float8_e5m2), "m": torch.ones(2, device="meta")}))
    return made


SEEDS = seeds()
PICKLES = [
    pickle.dumps(value, protocol)
    for protocol in range(6)
    for value in (
        {"a": np.arange(3), "o": OrderedDict(x=1), "s": {1, 2}, "b": b"x", "f": 1.5, "c": np.float32(1), "t": (1, [2])},
        [Counter("ab"), defaultdict(list), bytearray(b"ab"), frozenset([1]), 1 << 70, "é", 1j, np.array([{}], object)],
    )
]
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "put", "cut", "copy"]), st.integers(0, 1 << 16), st.integers(0, 255)),
    min_size=1, max_size=4,
)  # fmt: skip


def mutated(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(data)
    for kind, place, value in edits:
        at = place % max(len(out), 1)
        if kind == "flip" and out:
            out[at] ^= value or 1
        elif kind == "put":
            out[at:at] = bytes([value])
        elif kind == "cut":
            del out[at : at + value % 24 + 1]
        else:
            out[at:at] = out[value : value + 24]
    return bytes(out)


BOUNDED = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@BOUNDED
@given(st.integers(0, len(SEEDS) - 1), EDITS)
def test_mutated_files(which: int, edits: list[tuple[str, int, int]]) -> None:
    opened(mutated(SEEDS[which], edits))


@BOUNDED
@given(st.integers(0, len(SEEDS) - 1), EDITS)
def test_mutated_pickles_within_good_archives(which: int, edits: list[tuple[str, int, int]]) -> None:
    """With its CRC right again, a mutation gets further than the first check."""
    if SEEDS[which][:2] != b"PK":
        return
    opened(rezip(SEEDS[which], lambda n, b: [(n, mutated(b, edits) if n.endswith("data.pkl") else b)]))


@BOUNDED
@given(st.integers(0, len(PICKLES) - 1), EDITS)
def test_mutated_pickles(which: int, edits: list[tuple[str, int, int]]) -> None:
    opened(torch_zip(mutated(PICKLES[which], edits)))


def test_random_opcodes() -> None:
    """Opcodes in any order, and values nested in any way: every state of the machine is one that it copes with."""
    draw = random.Random(4)
    read = 0
    for _ in range(6_000):
        parts = [
            expression(draw, draw.randrange(5)) if draw.random() < 0.8 else opcode(draw)
            for _ in range(draw.randrange(1, 4))
        ]
        data = b"Nq\x00q\x01" + b"".join(parts) + b"."
        try:
            tree = read_pickle(data, persistent_load=_Fake().load, limits=DEFAULT)[0]
        except FormatError:
            continue
        read += 1
        listed(Index("torch zip", tree, StreamSource("t", io.BytesIO(data))))
    assert read > 1_000


class _Fake:
    """Persistent ids as a torch zip's, over one storage that is there."""

    def __init__(self) -> None:
        from anycard.containers.zip_directory import Record
        from anycard.formats.torch_zip import Archive, Storages

        record = Record("a/data/0", 0, 64, 64, None, False)
        pickled = Record("a/data.pkl", 0, 1, 1, None, False)
        source = StreamSource("t", io.BytesIO(bytes(64)))
        self.load = Storages(Archive(source, {r.name: r for r in (record, pickled)}, DEFAULT)).load
