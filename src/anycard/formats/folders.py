"""A folder that is a checkpoint, or that holds some: told by the names of its files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from anycard.disk.folder import Folder
from anycard.errors import FormatError
from anycard.formats import dcp, dcp_safetensors, shards, unpacked, zero, zero_masters
from anycard.formats.choosing_members import may_be, meant, no_member
from anycard.formats.index import Index
from anycard.formats.registry import read_index as read_any
from anycard.limits import Limits


class Unit(NamedTuple):
    """One checkpoint in a folder.

    Attributes:
        label: What `member=` calls it: a file's name, or that of a set of shards with `*` for the number.
        kind: "file", "index", "shards", "dcp" (`.metadata` and what it names), "dcp shards" (each rank's) or
            "unpacked" (a torch zip's records).
        files: The files of a set of shards.
    """

    label: str
    kind: str
    files: tuple[str, ...] = ()


def read_index(folder: Folder, limits: Limits, member: str | None = None) -> Index:
    """The index of the one checkpoint in a folder that is meant.

    Raises:
        ChoiceError: Several could be, or `member` is not there.
        FormatError: None is there, or it is damaged.
    """
    files = folder.files()
    found = units(files)
    latest = zero.latest(folder, files) if member == zero_masters.MASTERS or (member is None and not found) else None
    if latest is not None:
        return read_index(latest, limits, member)
    if zero_masters.are_meant(files, member):
        return zero_masters.read_index(folder, files, limits)
    if member is None and not found:
        files = folder.files(depth=2)
        found = _deeper(files)
    labels = [unit.label for unit in found]
    if member is not None and member not in labels:
        return _member(folder, member, labels, limits)
    label = meant(labels, folder.name, list(files)) if member is None else member
    index = _read(folder, next(unit for unit in found if unit.label == label), limits)
    index.metadata.update(zero.masters(index.tree, list(files)))
    return index


def _member(folder: Folder, member: str, labels: list[str], limits: Limits) -> Index:
    """What `member=` names beside the checkpoints that were found: any file or folder in the folder."""
    try:
        source = folder.open(member.rstrip("/"))
    except FormatError:
        raise no_member(member, labels or list(folder.files()), folder.name) from None
    return read_any(source, limits)


def _read(folder: Folder, unit: Unit, limits: Limits) -> Index:
    if unit.kind == "shards":
        return shards.unindexed(folder, unit.files, limits)
    if unit.kind == "dcp shards":
        return dcp_safetensors.read_index(folder, unit.files, limits)
    if unit.kind == "file":
        return read_any(folder.open(unit.label), limits)
    above = unit.label.rpartition("/")[0]
    home = folder.open(above) if above else folder
    assert isinstance(home, Folder)
    if unit.kind == "index":
        return shards.read_part(home, folder.open(unit.label), limits)
    return dcp.read_index(home, limits) if unit.kind == "dcp" else unpacked.read_index(home, limits)


def units(names: Collection[str]) -> list[Unit]:
    """The checkpoints among the files of one folder; shards are counted with their index."""
    if dcp.METADATA in names:
        return [Unit(dcp.METADATA, "dcp")]
    if all(name in names for name in unpacked.MEMBERS):
        return [Unit(unpacked.MEMBERS[0], "unpacked")]
    ranks = tuple(sorted(name for name in names if dcp_safetensors.SHARD.fullmatch(name)))
    names = [name for name in names if name not in ranks] if ranks else names
    indexes = [name for name in names if name.endswith(shards.INDEX)]
    stems = {name.removesuffix(".index.json") for name in indexes}
    sets: dict[str, list[str]] = {}
    single = []
    for name in names:
        part = shards.SHARD.fullmatch(name)
        if part is None:
            single.append(name)
        elif part["stem"] + part["suffix"] not in stems:
            sets.setdefault(f"{part['stem']}-*-of-{part['total']}{part['suffix']}", []).append(name)
    made = [Unit(name, "index") for name in indexes]
    made += [Unit(label, "shards", tuple(files)) for label, files in sets.items()]
    made += [Unit("shard-*.safetensors", "dcp shards", ranks)] if ranks else []
    return made + [Unit(name, "file") for name in single if may_be(name)]


def _deeper(names: Iterable[str]) -> list[Unit]:
    """The checkpoints in folders of a folder that has none itself."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        above, _, last = name.rpartition("/")
        by_folder.setdefault(above, []).append(last)
    made = []
    for above, held in by_folder.items():
        made += [Unit(f"{above}/{u.label}", u.kind, tuple(f"{above}/{f}" for f in u.files)) for u in units(held)]
    return made
