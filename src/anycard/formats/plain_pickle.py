"""Plain pickles (`pickle.dump`, cloudpickle, joblib), compressed ones too.

A tensor's storage is a whole torch file within the pickle. Source: torch/storage.py `__reduce__`,
`_load_from_bytes`; joblib/numpy_pickle.py.
"""

from __future__ import annotations

from typing import Any

from anycard.containers.streams import inflated, kind_of
from anycard.disk.source import MemorySource, Source
from anycard.errors import FormatError
from anycard.formats import legacy, torch_zip
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.budget import Budget
from anycard.pickles.embedded import Embedded
from anycard.pickles.machine import read_pickle
from anycard.pickles.stubs import Inert

_MOST_STACKED = 1_000
_TEXT = (b"(", b"]", b"}", b")", b"c")  # how pickles of protocols 0 and 1 begin that hold more than a number


def read_index(source: Source, limits: Limits) -> Index:
    """The index of a plain pickle. Others that follow the first are counted, not listed.

    Raises:
        FormatError: Damaged, or no pickle.
    """
    head = source.read(0, min(source.size, 16))
    if kind_of(head):
        data = _unpacked(source, limits)
        tree, count = _pickles(data, None, limits)
    else:
        tree, count = _from_file(source, limits, text=not head.startswith(b"\x80"))
    return Index("plain pickle", tree, source, metadata={"pickles": count} if count > 1 else {})


def _from_file(source: Source, limits: Limits, text: bool) -> tuple[Any, int]:
    size = min(source.size, limits.chunk_nbytes)
    try:
        return _checked(_pickles(source.read(0, size), source, limits), source, text)
    except FormatError as error:
        if not error.cut_short or size == source.size:
            raise _unknown(source) if text else error from None
    if source.size > limits.index_nbytes:
        raise FormatError(f"a plain pickle of {source.size:,} bytes: at most {limits.index_nbytes:,} are read")
    try:
        return _checked(_pickles(source.read(0, source.size), source, limits), source, text)
    except FormatError as error:
        raise _unknown(source) if text else error from None


def _checked(found: tuple[Any, int], source: Source, text: bool) -> tuple[Any, int]:
    """Any text could be the pickle of some number: without a PROTO opcode it has to hold something."""
    if text and not isinstance(found[0], Inert) and not found[0]:
        raise _unknown(source)
    return found


def _unknown(source: Source) -> FormatError:
    head = source.read(0, min(source.size, 12))
    return FormatError(f"the file is no checkpoint that anycard knows; it begins with {head!r}", offset=0)


def _unpacked(source: Source, limits: Limits) -> bytes:
    kind = kind_of(source.read(0, min(source.size, 8)))
    pieces = inflated(source, limits.index_nbytes)
    first = b""
    for first in pieces:
        if first:
            break
    if not first.startswith((b"\x80", *_TEXT)):
        raise FormatError(f"the file is {kind}-compressed, and holds no pickle: unpack it first.", offset=0)
    return first + b"".join(pieces)


def _pickles(data: bytes, source: Source | None, limits: Limits) -> tuple[Any, int]:
    """The first pickle's object, and how many there are."""
    budget = budget_of(data, source, limits)
    tree, at = read_pickle(data, persistent_load=_refuse, limits=limits, budget=budget)
    count = 1
    while at < len(data) and data[at : at + 1] in (b"\x80", *_TEXT) and count < _MOST_STACKED:
        try:
            _, at = read_pickle(data, persistent_load=_refuse, limits=limits, start=at, budget=budget)
        except FormatError:
            break
        count += 1
    return tree, count


def budget_of(data: bytes, source: Source | None, limits: Limits) -> Budget:
    """What the reading of a plain pickle may spend, torch files and arrays within it included."""
    budget = Budget(limits, len(data))
    budget.embedded = Embedded(source, lambda held, place: _torch_file(held, place, budget))
    return budget


def _refuse(pid: Any) -> Any:
    raise FormatError("a plain pickle with persistent ids, which only the program that wrote it can read")


def _torch_file(data: bytes, place: tuple[Source, int] | None, budget: Budget) -> Any:
    if data.startswith(b"PK"):
        return torch_zip.read_index(MemorySource("a torch file within the pickle", data), budget.limits, budget).tree
    return legacy.read_nested(data, place, budget)
