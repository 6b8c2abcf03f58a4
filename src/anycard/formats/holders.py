"""Files that hold checkpoints: zips that are no torch zip, tars, and compressed files of one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from anycard.containers import streams
from anycard.containers.inflated import Inflated
from anycard.containers.tar_directory import is_tar, read_tar
from anycard.containers.zip_directory import Record, read_directory
from anycard.disk.source import Source, WindowSource
from anycard.disk.temporary import TemporarySource
from anycard.errors import FormatError
from anycard.formats import legacy_tar, torch_zip
from anycard.formats.archived_folder import ArchivedFolder
from anycard.formats.choosing_members import meant, no_member
from anycard.formats.folders import Unit, read_set, units_below
from anycard.formats.index import Index
from anycard.formats.registry import begins_torch_zip, is_checkpoint
from anycard.formats.registry import read_index as read_any
from anycard.limits import Limits
from anycard.pickles.views import short

_DEEPEST = 4
_MOST_INFLATED = 64 << 20  # what compressed files may come to, whatever their ratio
_RATIO = 100


def read_held(source: Source, limits: Limits, member: str | None, depth: int) -> Index | None:
    """The index of the checkpoint in a file that is meant; None where the file holds none, but may be one.

    Raises:
        ChoiceError: Several could be, or `member` is not there.
        FormatError: Damaged; or files in files without end.
    """
    head = source.read(0, min(source.size, 512))
    if not head.startswith(b"PK") and is_checkpoint(head):
        return None
    if streams.kind_of(head):
        return _compressed(source, head, limits, member, depth)
    records = _records(source, head, limits)
    if records is None:
        return None
    found = units_below(records)
    labels = [unit.label for unit in found]
    if member is None and not labels and head.startswith(b"PK"):
        return None  # the torch zip's reader says what it lacks
    if member is not None and member not in records and member not in labels:
        raise no_member(member, labels or list(records), source.name)
    name = meant(labels, source.name, list(records)) if member is None else member
    unit = next((unit for unit in found if unit.label == name and unit.kind != "file"), None)
    if unit is not None:
        return _read_unit(source, records, unit, limits)
    return _read(_opened(source, records[name]), f"member {short(name)!r}", records[name].offset, limits, None, depth)


def _read_unit(source: Source, records: Mapping[str, Record], unit: Unit, limits: Limits) -> Index:
    """A checkpoint of several members: shards, a DCP folder, a torch zip that was unpacked before it was packed."""
    left = _most(_packed(source))

    def opened(record: Record) -> Source:
        nonlocal left
        left -= record.nbytes if record.compressed else 0
        if left < 0:
            raise FormatError(f"record {record.name!r} and others inflate to too much (a bomb?)", offset=record.offset)
        return _opened(source, record)

    folder = ArchivedFolder(source, records, f"{unit.above}/" if unit.above else "", opened)
    if unit.kind == "unpacked":
        return torch_zip.read_archive(torch_zip.Archive(source, folder.records, limits))
    try:
        return read_set(folder, unit, limits)
    except BaseException:
        folder.close()
        raise


def _records(source: Source, head: bytes, limits: Limits) -> Mapping[str, Record] | None:
    if is_tar(head):
        return None if legacy_tar.is_legacy_tar(source, limits) else read_tar(source, limits)
    if not head.startswith(b"PK\x03\x04") or begins_torch_zip(head):
        return None  # torch's own archives begin so
    records = read_directory(source, limits)
    return None if torch_zip.is_torch(records) else records


def _opened(source: Source, record: Record) -> Source:
    """The bytes of a member: where they lie, or inflated."""
    if not record.compressed:
        return WindowSource(source, record.offset, record.nbytes)
    packed = _packed(source)
    if record.nbytes > _most(packed):
        raise FormatError(f"record {record.name!r} inflates to {record.nbytes:,} bytes (a bomb?)", offset=record.offset)
    return TemporarySource(source.name, Inflated(source, record).pieces(), packed)


def _packed(source: Source) -> int:
    """The size on disk of what everything comes from: files in files inflate no further than it may."""
    inner, _ = source.origin(0)
    return inner.packed_nbytes if isinstance(inner, TemporarySource) else inner.size


def _most(packed: int) -> int:
    return max(_MOST_INFLATED, _RATIO * packed)


def _compressed(source: Source, head: bytes, limits: Limits, member: str | None, depth: int) -> Index | None:
    """A compressed checkpoint or archive; a compressed pickle is a format of its own."""
    kind = streams.kind_of(head)
    packed = _packed(source)
    pieces = streams.inflated(source, _most(packed), _most(packed))
    first = b""
    while len(first) < 1024 and (piece := next(pieces, None)) is not None:
        first += piece
    inner = is_tar(first) or bool(streams.kind_of(first))
    if not inner and not is_checkpoint(first):
        return None
    made = TemporarySource(source.name, chain([first], pieces), packed)
    return _read(made, f"the {kind} stream's content", 0, limits, member, depth)


def _read(inner: Source, what: str, base: int, limits: Limits, member: str | None, depth: int) -> Index:
    if depth >= _DEEPEST:
        raise FormatError("files lie in files in files, deeper than any checkpoint does", path=inner.name)
    try:
        return read_any(inner, limits, member, depth + 1)
    except BaseException as error:
        if isinstance(inner, TemporarySource):
            inner.close()
        if isinstance(error, FormatError):
            inside = error.offset is not None and isinstance(inner, WindowSource)
            error.offset = (error.offset or 0) + base if inside else None
            error.args = (f"{what}: {error.args[0]}",)
        raise
