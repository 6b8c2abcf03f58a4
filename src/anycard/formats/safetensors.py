"""safetensors: eight bytes of length, a JSON header, then raw row-major little-endian data.

Source: the README of the safetensors project, section "Format".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import sub
from typing import Any, NamedTuple, NoReturn

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.brief import brief
from anycard.tensors import BY_SAFETENSORS, DTYPES, Form, Storage, TensorInfo, form_of

FINGERPRINT = "anycard.fingerprint"
OURS = "anycard"
KEPT = frozenset(("format", OURS, FINGERPRINT))  # keys of the metadata that cannot be a tied tensor's second name
HEADER_MOST = 100_000_000  # the limit of the safetensors library itself
_MOST = 1 << 62  # bytes and sizes
_SUB_BYTE = ("F6_E2M3", "F6_E3M2")
_FOUR_BITS = "F4"  # float4_e2m1fn_x2: two to an element, which the header counts one by one
_ROWS = {**BY_SAFETENSORS, _FOUR_BITS: DTYPES["float4_e2m1fn_x2"]}
_Shape = tuple[int, ...]
_SIZE = r"(0|[1-9][0-9]{0,18})"  # as JSON has integers, of those that can be
# An entry as the safetensors library and anycard spell it, with what follows.
_ENTRY = re.compile(
    rf'"([^"\\\x00-\x1f]*)":{{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],"data_offsets":\[{_SIZE},{_SIZE}\]}},'
)
_BETWEEN = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')  # characters of an entry beside what differs


class _Columns(NamedTuple):
    """The tensors of a header: by its own word, each of the type that it must have."""

    names: Sequence[str]
    kinds: Sequence[tuple[str, _Shape]]  # dtype's code and shape
    begins: Sequence[int]
    ends: Sequence[int]


def read_index(source: Source, limits: Limits) -> Index:
    """The index of a safetensors file; every range proved, no holes, no overlap.

    Raises:
        FormatError: Damaged or cut short, with what was promised and what is there.
    """
    data = _header(source, limits)
    start = 8 + len(data)
    metadata, columns = _spelt_as_usual(data) or _parsed(data, start, limits)
    tensors = _tensors(columns, source, start, limits)
    return Index("safetensors", tensors, source, metadata, _mark(metadata))


def _header(source: Source, limits: Limits) -> bytes:
    if source.size < 8:
        raise FormatError(f"the file is cut short: {source.size} bytes, a header needs at least 8", offset=source.size)
    size = int.from_bytes(source.read(0, 8), "little")
    if size > min(HEADER_MOST, limits.index_nbytes):
        raise FormatError(f"the header claims {size:,} bytes; no safetensors file has as many", offset=0)
    if 8 + size > source.size:
        raise FormatError(
            f"the file is cut short: its header should have {size:,} bytes, the file ends at {source.size:,}",
            offset=source.size,
        )
    data = source.read(8, size)
    if data.count(b"{") > limits.records + 2 or data.count(b"[") > 2 * limits.records + 2:
        raise FormatError("the header claims too many tensors", offset=8)
    return data


def _spelt_as_usual(data: bytes) -> tuple[dict[str, str], _Columns] | None:
    """Metadata and tensors of a header that is spelt as nearly all writers do; a third of the time of a parser.

    None for any other, be it good or bad.
    """
    try:
        text = data.decode().rstrip(" ")
        metadata, at = _first_metadata(text)
        entries = _ENTRY.findall(text[:-1] + ",", at)
        names, codes, shapes, begins, ends = zip(*entries, strict=True)
        differing = sum(len("".join(column)) for column in (names, codes, shapes, begins, ends))
        if text[-1] != "}" or at + differing + _BETWEEN * len(names) != len(text):
            return None  # something stands between
        if len(set(names)) < len(names) or "__metadata__" in names:
            return None
        known = {shape: _sizes(shape) for shape in set(shapes)}
    except (ValueError, RecursionError):
        return None
    stops = list(map(int, ends))
    starts = [0, *stops[:-1]] if begins == ("0", *ends[:-1]) else list(map(int, begins))
    return metadata, _Columns(names, list(zip(codes, map(known.__getitem__, shapes), strict=True)), starts, stops)


def _sizes(text: str) -> _Shape:
    sizes = tuple(json.loads(f"[{text}]"))
    if max(sizes, default=0) >= _MOST:
        raise ValueError
    return sizes


def _first_metadata(text: str) -> tuple[dict[str, str], int]:
    """What stands before the tensors, and where they begin.

    Raises:
        ValueError: It is spelt otherwise.
    """
    opening = '{"__metadata__":'
    if not text.startswith("{"):
        raise ValueError
    if not text.startswith(opening):
        return {}, 1
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    metadata, end = decoder.raw_decode(text, len(opening))
    if not _is_metadata(metadata) or text[end : end + 1] != ",":
        raise ValueError
    return metadata, end + 1


def _is_metadata(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _parsed(data: bytes, start: int, limits: Limits) -> tuple[dict[str, str], _Columns]:
    """Metadata and tensors of any header."""
    try:
        header = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is no valid JSON: {error}", offset=8) from None
    if not isinstance(header, dict):
        raise FormatError("the header is no JSON object", offset=8)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not _is_metadata(metadata):
        raise FormatError("__metadata__ is not a map from text to text", offset=8)
    try:
        return metadata, _columns(header)
    except (KeyError, TypeError, ValueError):
        _refuse_all(header, start, limits)


def _columns(header: Mapping[str, Any]) -> _Columns:
    """The header's entries.

    Raises:
        KeyError, TypeError, ValueError: Something is not there, not of the type that it must have, or negative.
    """
    entries = [(entry["dtype"], entry["shape"], entry["data_offsets"]) for entry in header.values()]
    codes, shapes, ranges = zip(*entries, strict=True) if entries else ((), (), ())
    numbers = [*chain.from_iterable(shapes), *chain.from_iterable(ranges)]
    if {*map(type, shapes), *map(type, ranges)} - {list} or {*map(type, codes)} - {str}:
        raise TypeError
    if {*map(type, numbers)} - {int}:
        raise TypeError
    if numbers and not (min(numbers) >= 0 and max(numbers) < _MOST):
        raise ValueError
    kinds = [(code, tuple(shape)) for code, shape in zip(codes, shapes, strict=True)]
    return _Columns(list(header), kinds, [begin for begin, _ in ranges], [end for _, end in ranges])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _tensors(columns: _Columns, source: Source, start: int, limits: Limits) -> dict[str, TensorInfo]:
    """The tensors, as views of all that follows the header; proved by columns, since there may be many."""
    names, kinds, begins, ends = columns
    try:
        known = {kind: _form(*kind, limits) for kind in set(kinds)}
        forms = list(map(known.__getitem__, kinds))
        good = [form.nbytes for form in forms] == list(map(sub, ends, begins))
    except (KeyError, ValueError):
        good = False
    if not good:
        _refuse_all({n: _entry(k, b, e) for n, k, b, e in zip(names, kinds, begins, ends, strict=True)}, start, limits)
    _prove(begins, ends, names, source, start)
    home, offset = source.origin(start)
    whole = Storage("data", source.size - start, "cpu", home, offset)
    tensors = dict(zip(names, map(TensorInfo, forms, repeat(whole), begins), strict=True))
    if not all(form.nbytes for form in known.values()):  # empty ones are not tied
        for name, form, begin in zip(names, forms, begins, strict=True):
            if not form.nbytes:
                tensors[name] = TensorInfo(form, Storage(name, 0, "cpu", home, offset + begin))
    return tensors


def _form(code: str, shape: _Shape, limits: Limits) -> Form:
    """A tensor's form; KeyError or ValueError for what no tensor has."""
    row = _ROWS[code]
    if len(shape) > limits.rank:
        raise ValueError
    return form_of(row.name, _of_elements(code, shape))


def _of_elements(code: str, shape: Sequence[int]) -> _Shape:
    """The shape as torch has it; ValueError where half an element would be left."""
    if code != _FOUR_BITS:
        return tuple(shape)
    *outer, last = shape
    if last % 2:
        raise ValueError
    return (*outer, last // 2)


def _entry(kind: tuple[str, _Shape], begin: int, end: int) -> dict[str, Any]:
    """An entry as the header has it."""
    return {"dtype": kind[0], "shape": list(kind[1]), "data_offsets": [begin, end]}


def _refuse_all(header: Mapping[str, Any], start: int, limits: Limits) -> NoReturn:
    """Say what is wrong with the first entry that is."""
    for name, entry in header.items():
        _refuse(name, entry, start, limits)
    raise FormatError("the header's entries do not have what tensors need", offset=8)


def _refuse(name: str, entry: Any, start: int, limits: Limits) -> None:
    """Say what is wrong with an entry, if it is this one."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{name}: its entry lacks dtype, shape or data_offsets", offset=8, name=name) from None
    row = _ROWS.get(code) if isinstance(code, str) else None
    if row is None:
        why = "has less than a byte per element, which no tensor of torch has" if code in _SUB_BYTE else "is not known"
        raise FormatError(f"{name}: dtype {brief(code)} {why}", offset=8, name=name)
    for number in [*shape, begin, end] if type(shape) is list else [None]:
        if type(number) is not int or not 0 <= number < _MOST:
            raise FormatError(f"{name}: its shape or offsets are no non-negative integers", offset=8, name=name)
    if len(shape) > limits.rank:
        raise FormatError(f"{name}: {len(shape):,} dimensions are too many", offset=8, name=name)
    try:
        nbytes = math.prod(_of_elements(code, shape)) * row.itemsize
    except ValueError:
        raise FormatError(f"{name}: {shape} of F4 is no whole number of bytes", offset=8, name=name) from None
    if nbytes != end - begin:
        raise FormatError(
            f"{name}: {row.name}, {shape} needs {nbytes:,} bytes, its range has {end - begin:,}",
            offset=start + begin,
            name=name,
        )


def _prove(begins: Sequence[int], ends: Sequence[int], names: Sequence[str], source: Source, start: int) -> None:
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
        mark = json.loads(metadata[OURS])
    except (KeyError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None
