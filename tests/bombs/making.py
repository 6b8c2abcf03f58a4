"""How bombs are made: opcodes, torch files, and the two lists of what becomes of them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable

Bomb = Callable[[], bytes]
REFUSED: list[Bomb] = []
READ: list[Bomb] = []

FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
DAG = b"K\x00K\x01\x86" + b"2\x86" * 60  # t = (t, t), 60 times: 2**60 leaves
DEEP = b"N" + b"\x85" * 1_000_000
TIMES = 5_000


def refused(bomb: Bomb) -> Bomb:
    REFUSED.append(bomb)
    return bomb


def read(bomb: Bomb) -> Bomb:
    READ.append(bomb)
    return bomb


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def num(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def torch_zip(data: bytes, storage: bytes = bytes(64), method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip of a pickle and one storage."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as held:
        for name, body in (("data.pkl", data), ("byteorder", b"little"), ("data/0", storage), ("version", b"3\n")):
            held.writestr(f"archive/{name}", body)
    return out.getvalue()


def pid(kind: bytes = FLOATS, key: bytes = text("0"), place: bytes = text("cpu"), numel: bytes = num(16)) -> bytes:
    """A persistent id as torch writes it, from the opcodes of its parts."""
    return b"(" + text("storage") + kind + key + place + numel + b"tQ"


def tensor(size: bytes, stride: bytes, offset: bytes = num(0), storage: bytes | None = None) -> bytes:
    return REBUILD + b"(" + (storage or pid()) + offset + size + stride + b"\x89NtR"


def ints(*values: int) -> bytes:
    return b"(" + b"".join(map(num, values)) + b"t"


def repeated(make: bytes, argument: bytes, call: bytes = b"\x85R0", times: int = TIMES) -> bytes:
    """`make(argument)`, over and over: both come out of the memo."""
    return b"\x80\x02" + make + b"q\x00" + argument + b"q\x01" + (b"h\x00h\x01" + call) * times + b"."


NUMBERS = b"](" + b"K\x01" * 20_000 + b"e"
PAIRS = b"](" + b"(K\x01K\x02t" * 20_000 + b"e"


def builtin(name: str) -> bytes:
    return f"cbuiltins\n{name}\n".encode()
