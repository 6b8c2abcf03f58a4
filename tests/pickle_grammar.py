"""Pickles in any order of opcodes, and of values nested in any way. Without torch."""

from __future__ import annotations

import pickletools
import random
import struct

from bombs import ints, num, pid, tensor, text

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
