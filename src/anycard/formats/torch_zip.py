"""torch zip (`torch.save` since 1.6): a stored zip of a pickle and one record for each storage.

Source: torch/serialization.py `_save`, `_load`; caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from anycard.containers import inflated
from anycard.containers.inflated import Inflated, Kept
from anycard.containers.zip_directory import Record, read_directory
from anycard.disk.source import MemorySource, Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.budget import Budget
from anycard.pickles.machine import read_pickle
from anycard.pickles.views import MOST_ELEMENTS, StoredStorage, is_storage_class, short
from anycard.tensors import DTYPES, Storage

_MOST_MARK = 16 << 20
# Torch's archives of other kinds: their module, and a record that only they have, of which a part is looked for first.
# TorchScript is like a torch zip.
_KINDS = tuple(
    (module, part, re.compile(rf"((?:[^/]+/)?){record}", re.DOTALL))
    for module, part, record in (
        ("torch_package", ".data/extern_modules", r"\.data/extern_modules"),
        ("torch_export", "_weights_config.json", r"data/weights/[^/]+_weights_config\.json"),
        ("torch_export", "serialized_state_dict.pt", r"serialized_state_dict\.pt"),
    )
)
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def read_index(source: Source, limits: Limits, budget: Budget | None = None, *, nested: bool = False) -> Index:
    """The index of a torch zip, or of another kind of torch's archives, told by its records.

    Args:
        budget: What the read may spend, where several share it.
        nested: Part of another archive, which is none of the other kinds then.

    Raises:
        FormatError: Damaged, or a zip of another kind.
    """
    return read_archive(Archive(source, read_directory(source, limits), limits), budget, nested=nested)


def read_archive(archive: Archive, budget: Budget | None = None, *, nested: bool = False) -> Index:
    """The same, of records wherever they lie."""
    source, limits = archive.source, archive.limits
    if archive.kind and not nested:
        index: Index = importlib.import_module(f"anycard.formats.{archive.kind}").read_index(archive)
        return index
    record = archive.record("data.pkl")
    storages = Storages(archive)
    data = index_bytes(archive, record)
    tree, _ = read_pickle(
        data,
        persistent_load=storages.load,
        storages=storages.storages,
        limits=limits,
        base=record.offset,
        budget=budget,
    )
    return Index("torch zip", tree, source, mark=archive.mark(), records=archive.records)


def index_bytes(archive: Archive, record: Record) -> bytes:
    """A pickle, a JSON text or code, of which a byte may become an object: none that inflates like a bomb."""
    if inflated.inflates_like_a_bomb(record):
        raise FormatError(
            f"record {record.name!r} inflates to far more than pickles do (a bomb?)", offset=record.offset
        )
    return bytes(record_bytes(archive.source, record, archive.limits))


def record_bytes(source: Source, record: Record, limits: Limits) -> bytes | bytearray:
    """A small record's bytes, inflated where it is compressed, checked against its CRC."""
    return inflated.record_bytes(source, record, limits.index_nbytes)


def is_torch(names: Iterable[str]) -> bool:
    """Records of these names make an archive of torch's."""
    lower = [_folded(name) for name in names]
    pickle = any(n == "data.pkl" or (n.endswith("/data.pkl") and n.count("/") == 1) for n in lower)
    return pickle or any(part in n and record.fullmatch(n) for _, part, record in _KINDS for n in lower)


def _folded(name: str) -> str:
    """In lower case as torch's zip reader has it: ASCII only, so that no name changes its length."""
    return name.lower() if name.isascii() else name.translate(_LOWER)


class Archive:
    """Records by the names that torch gives them: below one folder, or none, without regard to case."""

    def __init__(self, source: Source, records: dict[str, Record], limits: Limits) -> None:
        self.source = source
        self.records = records
        self.limits = limits
        self.kept = Kept()
        lower = [_folded(name) for name in records]
        self._by_name = dict(zip(lower, records.values(), strict=True))
        self._twice: set[str] = set()
        if len(self._by_name) < len(records):
            self._twice = {name for name, count in Counter(lower).items() if count > 1}
        self.kind = ""
        self._folder = self._find_folder()

    def _find_folder(self) -> str:
        names = self._by_name
        text = "\n".join(names)  # there may be many, and hardly any is of use here
        for kind, part, record in _KINDS:
            found = next(filter(None, map(record.fullmatch, names)), None) if part in text else None
            if found is not None:
                self.kind = kind
                return found[1]
        folders = [
            n[: -len("data.pkl")] for n in names if n == "data.pkl" or (n.endswith("/data.pkl") and n.count("/") == 1)
        ]
        if len(folders) != 1:
            inside = ", ".join(repr(short(n)) for n in list(self.records)[:12])
            raise FormatError(
                "the file is a zip archive, but no torch zip "
                f"({'several' if folders else 'no'} data.pkl in it); it holds {inside}"
            )
        if folders[0] + "constants.pkl" in names:
            self.kind = "torchscript"
        return folders[0]

    def find(self, name: str) -> Record | None:
        """The record of that name in the folder, or None."""
        full = self._folder + _folded(name)
        if self._twice and full in self._twice:
            raise FormatError(f"two records are called {short(full)!r}, but for upper and lower case")
        return self._by_name.get(full)

    def find_each(self, folder: str, names: Sequence[str], suffix: str) -> list[Record] | None:
        """The records of these names, all of it in lower case; None where they are not all there, each once."""
        start = self._folder + folder
        try:
            found = list(map(self._by_name.__getitem__, [f"{start}{name}{suffix}" for name in names]))
        except KeyError:
            return None
        return None if self._twice else found

    def below(self) -> dict[str, Record]:
        """The records in the folder, by their names in it."""
        skip = len(self._folder)
        return {n[skip:]: r for n, r in self.records.items() if _folded(n).startswith(self._folder)}

    def record(self, name: str) -> Record:
        """The same, of a record that has to be there."""
        found = self.find(name)
        if found is None:
            raise FormatError(f"the archive has no record {short(name)!r}", offset=0)
        return found

    def big_endian(self) -> bool:
        """Elements are stored most significant byte first; torch wrote no `byteorder` before 2.1."""
        record = self.find("byteorder")
        if record is None:
            return False
        order = bytes(inflated.record_bytes(self.source, record, 64))
        if order not in (b"little", b"big"):
            raise FormatError("the archive's byte order is neither little nor big", offset=record.offset)
        return order == b"big"

    def mark(self) -> dict[str, Any] | None:
        """anycard's own record, or None where there is none that it wrote."""
        record = self.find(".anycard.json")
        if record is None or record.nbytes > _MOST_MARK:
            return None
        data = bytes(inflated.record_bytes(self.source, record, _MOST_MARK))
        try:
            held = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return held if isinstance(held, dict) else None


class Storages:
    """Persistent ids of one archive: `('storage', class, key, location, numel)`."""

    def __init__(self, archive: Archive, folder: str = "data/", suffix: str = "") -> None:
        self._archive = archive
        self._folder, self._suffix = folder, suffix
        self._big = archive.big_endian()
        self._made: dict[str, Storage] = {}

    def load(self, pid: Any) -> StoredStorage:
        """The storage of a persistent id, its record proved to hold what is claimed."""
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            raise FormatError("a persistent id that torch does not write")
        kind, key, location, numel = pid[1:5]
        if type(key) is not str or type(location) is not str or not is_storage_class(kind):
            raise FormatError("a persistent id that torch does not write")
        if type(numel) is not int or not 0 <= numel < MOST_ELEMENTS:
            raise FormatError(f"storage {short(key)} has no size that torch can hold", name=short(key))
        storage = self.storage(key, location)
        size = DTYPES[kind.dtype].itemsize if kind.dtype else 1
        if numel * size > storage.nbytes:
            raise FormatError(
                f"storage {short(key)} should have {numel * size:,} bytes, its record has {storage.nbytes:,}",
                name=short(key),
            )
        return kind.of(storage, numel)

    def storage(self, key: str, location: str) -> Storage:
        """The storage of a key; the first mention of it says where it stood."""
        storage = self._made.get(key)
        if storage is None:
            name = f"{self._folder}{key}{self._suffix}"
            record = self._archive.find(name)
            if record is None:
                raise FormatError(f"storage {short(key)} has no record {short(name)} in the archive", name=short(key))
            storage = self._made[key] = storage_of(self._archive, record, key, location, self._big)
        return storage

    def storages(self, keys: Sequence[str], location: str) -> list[Storage]:
        """The storages of many keys, which are decimal numbers; up to the first that is not there."""
        records = self._archive.find_each(self._folder, keys, self._suffix)
        new = len(set(keys)) == len(keys) and self._made.keys().isdisjoint(keys)
        if records is None or not new or isinstance(self._archive.source, MemorySource):
            return self._one_by_one(keys, location)
        _, offsets, sizes, _, crcs, packed = zip(*records, strict=True)
        if any(packed):
            return self._one_by_one(keys, location)
        source, base = self._archive.source.origin(0)
        places = [base + offset for offset in offsets] if base else offsets
        same = (repeat(location), repeat(source), places, repeat(None), crcs, repeat(self._big))
        made = list(map(Storage, keys, sizes, *same))
        self._made.update(zip(keys, made, strict=True))
        return made

    def _one_by_one(self, keys: Sequence[str], location: str) -> list[Storage]:
        found: list[Storage] = []
        for key in keys:
            try:
                found.append(self.storage(key, location))
            except FormatError:
                break
        return found


def storage_of(archive: Archive, record: Record, key: str, location: str, big: bool) -> Storage:
    """The bytes of a record."""
    if record.compressed:
        data = Inflated(archive.source, record, archive.kept)
        return Storage(key, record.nbytes, location, archive.source, data=data, big_endian=big)
    if isinstance(archive.source, MemorySource):  # an archive within something that was inflated: no place in a file
        held = archive.source.read(record.offset, record.nbytes)
        return Storage(key, record.nbytes, location, data=held, big_endian=big)
    source, offset = archive.source.origin(record.offset)
    return Storage(key, record.nbytes, location, source, offset, None, record.crc, big)
