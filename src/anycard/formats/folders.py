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
        label: What `member=` calls it: a file's path, or that of a set of shards with `*` for the number.
        kind: "file", "index", "shards", "dcp" (`.metadata` and what it names), "dcp shards" (each rank's) or
            "unpacked" (a torch zip's records).
        files: The files of a set of shards, by their names alone.
        above: The folder that it lies in, from where it was looked for.
    """

    label: str
    kind: str
    files: tuple[str, ...] = ()
    above: str = ""


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
        found = units_below(files)
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
    if unit.kind == "file":
        return read_any(folder.open(unit.label), limits)
    home = folder.open(unit.above) if unit.above else folder
    assert isinstance(home, Folder)
    return unpacked.read_index(home, limits) if unit.kind == "unpacked" else read_set(home, unit, limits)


def read_set(home: Folder, unit: Unit, limits: Limits) -> Index:
    """The index of a checkpoint of several files, its folder given."""
    if unit.kind == "shards":
        return shards.unindexed(home, unit.files, limits)
    if unit.kind == "dcp shards":
        return dcp_safetensors.read_index(home, unit.files, limits)
    if unit.kind == "dcp":
        return dcp.read_index(home, limits)
    return shards.read_part(home, home.open(unit.label.rpartition("/")[2]), limits)


def units(names: Collection[str]) -> list[Unit]:
    """The checkpoints among the files of one folder; shards are counted with their index."""
    if dcp.METADATA in names:
        return [Unit(dcp.METADATA, "dcp")]
    if all(name in names for name in unpacked.MEMBERS):
        return [Unit(unpacked.MEMBERS[0], "unpacked")]
    names = [name for name in names if not name.startswith("._")]  # what macOS puts beside each file
    ranks = tuple(sorted(name for name in names if dcp_safetensors.SHARD.fullmatch(name)))
    names = [name for name in names if not dcp_safetensors.SHARD.fullmatch(name)]
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


def units_below(names: Iterable[str]) -> list[Unit]:
    """The checkpoints among files of several folders, by their paths."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        above, _, last = name.rpartition("/")
        by_folder.setdefault(above, []).append(last)
    made = []
    for above, held in by_folder.items():
        path = f"{above}/" if above else ""
        made += [Unit(path + unit.label, unit.kind, unit.files, above) for unit in units(held)]
    return sorted(made)
