"""Write a safetensors file, which carries its fingerprint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, BinaryIO

from blake3 import blake3

from anycard.disk.pieces import Piece
from anycard.disk.placing import Placed, run_writes
from anycard.errors import CheckpointError
from anycard.formats.safetensors import FINGERPRINT, HEADER_MOST
from anycard.limits import Limits
from anycard.names.fingerprint import fingerprint, tensor_line
from anycard.tensors import DTYPES

_PLACE = "blake3:" + "0" * 64


def write_safetensors(
    file: BinaryIO,
    tensors: Sequence[tuple[str, str, tuple[int, ...], Piece]],
    metadata: dict[str, str],
    limits: Limits,
    *,
    ties: dict[str, str] | None = None,
) -> None:
    """Write name, dtype, shape and bytes; the fingerprint goes into the header at the end.

    Args:
        ties: Second name -> name whose bytes are written.

    Raises:
        CheckpointError: Something that safetensors cannot hold; names the tensor.
    """
    _check(tensors, ties or {})
    ordered = sorted(tensors, key=lambda row: -DTYPES[row[1]].itemsize)
    header = _head(ordered, {**metadata, "format": "pt", FINGERPRINT: _PLACE})
    at = len(header)
    placed = []
    for name, _, _, piece in ordered:
        placed.append(Placed(at, piece, name))
        at += piece.nbytes
    base = file.tell()
    digests = run_writes(file, placed, blake3, limits, total=at)
    told = {row[0]: (row[1], row[2], digest.hexdigest()) for row, digest in zip(ordered, digests, strict=True)}
    kept = {**{name: name for name in told}, **(ties or {})}
    lines = {name: tensor_line(name, *told[of]) for name, of in kept.items()}
    key = f'"{FINGERPRINT}":"'.encode()
    file.seek(base)
    file.write(header.replace(key + _PLACE.encode(), key + fingerprint(lines).encode(), 1))
    file.seek(base + at)


def _check(tensors: Sequence[tuple[str, str, tuple[int, ...], Piece]], ties: dict[str, str]) -> None:
    names = {row[0] for row in tensors}
    if len(names) != len(tensors) or names & ties.keys() or "__metadata__" in names:
        raise CheckpointError("a name is there twice, or is __metadata__, which safetensors keeps for itself")
    if not names.issuperset(ties.values()):
        raise CheckpointError("a tied name refers to a tensor that is not written")
    for name, dtype, shape, piece in tensors:
        row = DTYPES.get(dtype)
        if row is None or row.safetensors is None:
            raise CheckpointError(f"{name}: safetensors has no {dtype}; save as .pt or .pth", name=name)
        if piece.nbytes != math.prod(shape) * row.itemsize:
            raise CheckpointError(f"{name}: {dtype}, {list(shape)} does not have {piece.nbytes:,} bytes", name=name)


def _head(tensors: Sequence[tuple[str, str, tuple[int, ...], Piece]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, piece in tensors:
        entries[name] = {
            "dtype": DTYPES[dtype].safetensors, "shape": list(shape), "data_offsets": [at, at + piece.nbytes],
        }  # fmt: skip
        at += piece.nbytes
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"a name is no valid text: {error}") from None
    text += b" " * (-(8 + len(text)) % 64)
    if len(text) > HEADER_MOST:
        raise CheckpointError(f"the names need a header of {len(text):,} bytes; safetensors reads {HEADER_MOST:,}")
    return len(text).to_bytes(8, "little") + text
