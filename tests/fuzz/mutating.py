"""Mutations that get past the first check: of what lies within archives, and of pickles by whole opcodes."""

from __future__ import annotations

import pickletools
import random
from collections.abc import Callable

from bombs import num
from fuzz.layers import Layer, layers
from pickle_grammar import ATOMS, GLOBALS, expression, opcode

_NUMBERS = (-1, 0, 1, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 63) - 1, 1 << 70, -(1 << 63))
_WORDS = (
    '"weight_map"', '"metadata"', '"__metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"F32"', '"F8_E4M3"',
    '"config"', '"tensor_meta"', '"sizes"', '"as_int"', '"use_pickle"', '"path_name"', "NaN", "1e999", "-1", "[]",
    "{}", "null", "18446744073709551616", "data.pkl", "byteorder", "PK\1\2", "PK\3\4", "PK\5\6", "PK\6\6", "ustar",
)  # fmt: skip

Mutate = Callable[[bytes, int], bytes]


def dictionary() -> str:
    """Words for libFuzzer's own mutations."""
    words = [word.encode("latin1") for word in _WORDS] + ATOMS + [num(value) for value in _NUMBERS]
    words += [name.replace(" ", "\n").encode() for name in GLOBALS]
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words if len(word) < 60)


def mutated(data: bytes, most: int, draw: random.Random, mutate: Mutate, folder: bool) -> bytes:
    """The input with one or a few changes; of a folder's files, not of the zip that carries them."""
    new = data
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        held = layers(new)[folder:]
        if not held:
            return mutate(data, most)
        layer = draw.choices(held, [_weight(one) for one in held])[0]
        new = layer.rebuilt(_changed(layer, draw, mutate))
    return new if len(new) <= most else data


def _weight(layer: Layer) -> int:
    """Indexes are worth more than the bytes of tensors."""
    return 5 if layer.data[:1] in (b"\x80", b"{") or layer.data[8:9] == b"{" or layer.data[:2] == b"PK" else 1


def _changed(layer: Layer, draw: random.Random, mutate: Mutate) -> bytes | None:
    if layer.droppable and draw.random() < 0.02:
        return None
    spans = _opcodes(layer.data) if draw.random() < 0.6 else []
    return _repickled(layer.data, spans, draw) if len(spans) > 2 else mutate(layer.data, len(layer.data) + 256)


def _opcodes(data: bytes) -> list[int]:
    """Where the opcodes of the pickles at the start begin."""
    places: list[int] = []
    at = 0
    while data[at : at + 1] == b"\x80":
        end = at
        try:
            for op, _, place in pickletools.genops(data[at:]):
                places.append(at + (place or 0))
                if op.name == "STOP":
                    end = at + (place or 0) + 1
        except (ValueError, IndexError, OverflowError, UnicodeError):
            break
        at = end
    return places


def _repickled(data: bytes, places: list[int], draw: random.Random) -> bytes:
    which = draw.randrange(len(places) - 1)
    start = places[which]
    end = places[min(which + draw.choice((1, 1, 1, 2, 5)), len(places) - 1)]
    other = draw.choice(places)
    run = data[other : places[min(places.index(other) + draw.randrange(1, 8), len(places) - 1)]]
    new = draw.choice((
        b"", run, data[start:end] + run, expression(draw, 2), data[start:end] * 2,
        data[start:end] + expression(draw, 2) + b"0", opcode(draw), num(draw.choice(_NUMBERS)), draw.choice(ATOMS),
    ))  # fmt: skip
    return data[:start] + new + data[end:]
