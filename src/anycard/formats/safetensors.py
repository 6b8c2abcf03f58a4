"""safetensors: eight bytes of length, a JSON header, then raw row-major little-endian data.

Source: the README of the safetensors project, section "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, BinaryIO

from blake3 import blake3

from anycard.disk.pieces import Piece
from anycard.disk.placing import Placed, run_writes
from anycard.disk.source import Source
from anycard.errors import CheckpointError, FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.names.fingerprint import fingerprint, tensor_line
from anycard.tensors import BY_SAFETENSORS, DTYPES, Storage, TensorInfo, row_major

FINGERPRINT = "anycard.fingerprint"
_HEADER_MOST = 100_000_000  # the limit of the safetensors library itself
_MOST = 1 << 62  # bytes and sizes
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
_Shape = tuple[int, ...]
_PLACE = "blake3:" + "0" * 64


def read_index(source: Source, limits: Limits) -> Index:
    """The index of a safetensors file; every range proved, no holes, no overlap.

    Raises:
        FormatError: Damaged or cut short, with what was promised and what is there.
    """
    header, start = _header(source, limits)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ is not a map from text to text", offset=8)
    tensors = _tensors(header, source, start, limits)
    return Index("safetensors", tensors, source, metadata, _mark(metadata))


def _header(source: Source, limits: Limits) -> tuple[dict[str, Any], int]:
    if source.size < 8:
        raise FormatError(f"the file is cut short: {source.size} bytes, a header needs at least 8", offset=source.size)
    size = int.from_bytes(source.read(0, 8), "little")
    if size > min(_HEADER_MOST, limits.index_nbytes):
        raise FormatError(f"the header claims {size:,} bytes; no safetensors file has as many", offset=0)
    if 8 + size > source.size:
        raise FormatError(
            f"the file is cut short: its header should have {size:,} bytes, the file ends at {source.size:,}",
            offset=source.size,
        )
    data = source.read(8, size)
    if data.count(b"{") > limits.records + 2 or data.count(b"[") > 2 * limits.records + 2:
        raise FormatError("the header claims too many tensors", offset=8)
    try:
        header = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is no valid JSON: {error}", offset=8) from None
    if not isinstance(header, dict):
        raise FormatError("the header is no JSON object", offset=8)
    return header, 8 + size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _tensors(header: dict[str, Any], source: Source, start: int, limits: Limits) -> dict[str, TensorInfo]:
    """The tensors of a header, as views of all that follows it; proved by columns, since there may be many."""
    try:
        entries = [(entry["dtype"], entry["shape"], entry["data_offsets"]) for entry in header.values()]
        codes, shapes, begins, ends = _columns(entries)
        forms = list(zip(codes, shapes, strict=True))
        kinds = {form: _kind(*form, limits) for form in set(forms)}
        good = [kinds[form][2] for form in forms] == [end - begin for begin, end in zip(begins, ends, strict=True)]
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        for name, entry in header.items():
            _refuse(name, entry, start, limits)
        raise FormatError("the header's entries do not have what tensors need", offset=8)
    _prove(begins, ends, list(header), source, start)
    home, offset = source.origin(start)
    whole = Storage("data", source.size - start, "cpu", home, offset)
    tensors = {}
    for name, form, begin in zip(header, forms, begins, strict=True):
        dtype, stride, nbytes = kinds[form]
        held = whole if nbytes else Storage(name, 0, "cpu", home, offset + begin)  # empty ones are not tied
        tensors[name] = TensorInfo(dtype, form[1], held, stride=stride, start=begin if nbytes else 0)
    return tensors


def _columns(entries: Sequence[tuple[Any, Any, Any]]) -> tuple[Sequence[str], Sequence[_Shape], list[int], list[int]]:
    """Codes, shapes, begins and ends.

    Raises:
        TypeError, ValueError: Something is not of the type that it must have, or negative.
    """
    codes, shapes, ranges = zip(*entries, strict=True) if entries else ((), (), ())
    numbers = [*chain.from_iterable(shapes), *chain.from_iterable(ranges)]
    if {*map(type, shapes), *map(type, ranges)} - {list} or {*map(type, numbers)} - {int}:
        raise TypeError
    if numbers and not (min(numbers) >= 0 and max(numbers) < _MOST):
        raise ValueError
    return codes, [tuple(shape) for shape in shapes], [begin for begin, _ in ranges], [end for _, end in ranges]


def _kind(code: str, shape: _Shape, limits: Limits) -> tuple[str, _Shape, int]:
    """Dtype, strides and bytes; KeyError or ValueError for what no tensor has."""
    row = BY_SAFETENSORS[code]
    if len(shape) > limits.rank:
        raise ValueError
    return row.name, row_major(shape), math.prod(shape) * row.itemsize


def _refuse(name: str, entry: Any, start: int, limits: Limits) -> None:
    """Say what is wrong with an entry, if it is this one."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{name}: its entry lacks dtype, shape or data_offsets", offset=8, name=name) from None
    row = BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if row is None:
        why = "has less than a byte per element, which no tensor of torch has" if code in _SUB_BYTE else "is not known"
        raise FormatError(f"{name}: dtype {code!r:.40} {why}", offset=8, name=name)
    for number in [*shape, begin, end] if type(shape) is list else [None]:
        if type(number) is not int or not 0 <= number < _MOST:
            raise FormatError(f"{name}: its shape or offsets are no non-negative integers", offset=8, name=name)
    if len(shape) > limits.rank:
        raise FormatError(f"{name}: {len(shape):,} dimensions are too many", offset=8, name=name)
    nbytes = math.prod(shape) * row.itemsize
    if nbytes != end - begin:
        raise FormatError(
            f"{name}: {row.name}, {shape} needs {nbytes:,} bytes, its range has {end - begin:,}",
            offset=start + begin,
            name=name,
        )


def _prove(begins: list[int], ends: list[int], names: Sequence[str], source: Source, start: int) -> None:
    """No overlap, no hole, and the file ends where the last tensor does."""
    at = start
    if begins == [0, *ends[:-1]][: len(begins)]:  # in order, as nearly all writers have them
        at += ends[-1] if ends else 0
    else:
        for begin, end, name in sorted(zip(begins, ends, names, strict=True)):
            if start + begin != at:
                raise FormatError(f"{name} overlaps its neighbour or leaves a hole", offset=start + begin, name=name)
            at = start + end
    if at != source.size:
        what = "is cut short" if at > source.size else "has bytes that no tensor owns"
        raise FormatError(f"the file {what}: {at:,} bytes are promised, {source.size:,} are there", offset=source.size)


def _mark(metadata: dict[str, str]) -> dict[str, Any] | None:
    try:
        mark = json.loads(metadata["anycard"])
    except (KeyError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None


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
    if len(text) > _HEADER_MOST:
        raise CheckpointError(f"the names need a header of {len(text):,} bytes; safetensors reads {_HEADER_MOST:,}")
    return len(text).to_bytes(8, "little") + text
