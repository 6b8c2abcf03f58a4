"""Anything at all: good files with a few bytes changed, and opcodes in any order. A result or a FormatError."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
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
from bombs import ints, num, pid, tensor, text, torch_zip


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


GLOBALS = [
    "builtins getattr", "builtins set", "builtins frozenset", "builtins dict", "builtins list", "builtins tuple",
    "builtins str", "builtins int", "builtins bytes", "builtins bytearray", "builtins complex",
    "collections OrderedDict", "collections Counter", "collections defaultdict",
    "copyreg _reconstructor", "_codecs encode", "torch FloatStorage",
    "torch.storage UntypedStorage", "torch Size", "torch float32", "torch device", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_meta_tensor_no_storage", "numpy dtype", "numpy.core.multiarray _reconstruct",
    "numpy.core.multiarray scalar", "numpy.core.numeric _frombuffer", "os system", "torch.nn.modules.linear Linear",
]  # fmt: skip
ATOMS = [
    b"N", b"\x88", b"K\x00", b"K\x01", b"K\x04", num(-1), num(1 << 70), b"G" + bytes(8), b"C\x01x", pid(),
    b"U\x02\xff\xfe", tensor(ints(4), ints(1)), ints(2, 2), *map(text, ("state_dict", "_modules", "f4", "<", "latin1")),
    *(f"c{name.replace(' ', chr(10))}\n".encode() for name in GLOBALS),
]  # fmt: skip


def expression(draw: random.Random, depth: int) -> bytes:
    """Opcodes that push one value, whatever it is."""
    if depth == 0 or draw.random() < 0.25:
        return draw.choice([*ATOMS, b"h\x00", b"h\x01"])
    parts = [expression(draw, depth - 1) for _ in range(draw.randrange(4))]
    many = b"(" + b"".join(parts)
    pairs = b"(" + b"".join(draw.choice(ATOMS) + part for part in parts)
    value = expression(draw, depth - 1)
    called = draw.choice([b"R", b"\x81", b"}\x92"])
    return draw.choice([
        many + b"t", many + b"l", many + b"\x91", b"\x8f" + many + b"\x90", pairs + b"d", b"}" + pairs + b"u",
        draw.choice(ATOMS) + many + b"t" + called, draw.choice(ATOMS) + many + b"t" + called + value + b"b",
        value + pairs + b"u", value + many + b"e", value + b"q\x00", value + b"\x94", value + b"Q",
        value + value + b"b",
    ])  # fmt: skip


def opcode(draw: random.Random) -> bytes:
    """One well-formed opcode with a random argument."""
    op = draw.choice(pickletools.opcodes)
    if op.name == "STOP":
        return b"N"
    code, name = op.code.encode("latin1"), "" if op.arg is None else op.arg.name
    small = draw.randrange(4)
    if not name:
        return code
    if name in ("uint1", "uint2", "uint4", "int4", "uint8"):
        return code + small.to_bytes(int(name[-1]), "little")
    if name == "float8":
        return code + struct.pack(">d", draw.choice([0.0, -1.5, 1e308]))
    body = draw.choice([b"", b"ab", b"0", b"\xff\x01", bytes(8)])
    if name.endswith(("1", "4", "8")):  # counted strings and integers
        return code + len(body).to_bytes(int(name[-1]), "little") + body
    if name == "stringnl_noescape_pair":
        return code + draw.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
    return code + draw.choice([b"0", b"1", b"'a'", b"1.5", b"01", b"7L"]) + b"\n"


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
