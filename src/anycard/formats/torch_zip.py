"""torch zip (`torch.save` since 1.6): a stored zip of a pickle and one record for each storage.

Source: torch/serialization.py `_save`, `_load`; caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from zlib_ng import zlib_ng

from anycard.containers.zip_directory import Record, read_directory
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.known import StorageClass, StorageRef
from anycard.pickles.machine import read_pickle
from anycard.tensors import DTYPES, Storage


def read_index(source: Source, limits: Limits) -> Index:
    """The index of a torch zip.

    Raises:
        FormatError: Damaged, or a zip of another kind.
    """
    records = read_directory(source, limits)
    folder = _folder(records)
    data = record_bytes(source, records[folder + "data.pkl"], limits)
    big = folder + "byteorder" in records and record_bytes(source, records[folder + "byteorder"], limits) == b"big"
    storages = _Storages(source, records, folder, big)
    tree, _ = read_pickle(data, persistent_load=storages.load, limits=limits, base=records[folder + "data.pkl"].offset)
    return Index("torch zip", tree, source, mark=_mark(source, records, folder, limits), records=records)


def _folder(records: dict[str, Record]) -> str:
    if any(name.endswith("/.data/extern_modules") for name in records):
        raise FormatError("the file is a torch package, which is not read yet")
    found = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        inside = ", ".join(repr(n) for n in list(records)[:12])
        raise FormatError(f"the file is a zip archive, but no torch zip (no data.pkl in it); it holds {inside}")
    if found[0] + "constants.pkl" in records:
        raise FormatError("the file is a TorchScript archive, which is not read yet")
    return found[0]


def record_bytes(source: Source, record: Record, limits: Limits) -> bytes:
    """A small record's bytes, inflated where it is compressed, checked against its CRC."""
    if max(record.nbytes, record.stored_nbytes) > limits.index_nbytes:
        raise FormatError(f"record {record.name!r} claims {record.nbytes:,} bytes", offset=record.offset)
    data = source.read(record.offset, record.stored_nbytes)
    if record.compressed:
        data = _inflated(data, record)
    if record.crc is not None and zlib_ng.crc32(data) != record.crc:
        raise FormatError(f"record {record.name!r} is damaged: its CRC-32 does not match", offset=record.offset)
    return data


def _inflated(data: bytes, record: Record) -> bytes:
    if record.nbytes > 1032 * (len(data) + 1):
        raise FormatError(f"record {record.name!r} claims more than deflate can hold", offset=record.offset)
    try:
        out = zlib.decompressobj(-15).decompress(data, record.nbytes + 1)
    except zlib.error as error:
        raise FormatError(f"record {record.name!r} is damaged: {error}", offset=record.offset) from None
    if len(out) != record.nbytes:
        raise FormatError(f"record {record.name!r} is damaged: its size does not match", offset=record.offset)
    return out


def _mark(source: Source, records: dict[str, Record], folder: str, limits: Limits) -> dict[str, Any] | None:
    record = records.get(folder + ".anycard.json")
    if record is None or record.nbytes > 64 << 20:
        return None
    try:
        held = json.loads(record_bytes(source, record, limits))
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


class _Storages:
    """Persistent ids of one archive: `('storage', class, key, location, numel)`."""

    def __init__(self, source: Source, records: dict[str, Record], folder: str, big: bool) -> None:
        self.source = source
        self.records = records
        self.folder = folder
        self.big = big
        self.made: dict[str, Storage] = {}

    def load(self, pid: Any) -> StorageRef:
        """The storage of a persistent id, its record proved to hold what is claimed."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise FormatError(f"a persistent id that torch does not write: {str(pid)[:80]}")
        _, kind, key, location, numel = pid[:5]
        if not isinstance(kind, StorageClass) or not isinstance(key, str) or type(numel) is not int:
            raise FormatError(f"a persistent id that torch does not write: {str(pid)[:80]}")
        if key not in self.made:
            self.made[key] = self._make(key, str(location))
        storage = self.made[key]
        size = DTYPES[kind.dtype].itemsize if kind.dtype else 1
        if numel < 0 or numel * size > storage.nbytes:
            raise FormatError(
                f"storage {key} should have {numel * size:,} bytes, its record has {storage.nbytes:,}", name=key
            )
        return StorageRef(storage, kind.dtype, 0)

    def _make(self, key: str, location: str) -> Storage:
        record = self.records.get(f"{self.folder}data/{key}")
        if record is None:
            raise FormatError(f"storage {key} has no record data/{key} in the archive", name=key)
        if record.compressed:
            return Storage(key, record.nbytes, location, self.source, missing="its record is compressed")
        return Storage(key, record.nbytes, location, self.source, record.offset, crc=record.crc, big_endian=self.big)
