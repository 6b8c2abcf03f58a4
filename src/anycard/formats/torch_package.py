"""torch packages (`torch.package.PackageExporter`): every pickle in them, storages in `.data/N.storage`.

Source: torch/package/package_exporter.py, package_importer.py.
"""

from __future__ import annotations

from typing import Any

from anycard.containers.zip_directory import Record
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.formats.torch_zip import Archive, Storages, index_bytes
from anycard.formats.torchscript import read_packaged
from anycard.pickles.machine import read_pickle
from anycard.pickles.stubs import Inert, inert_class


def read_index(archive: Archive) -> Index:
    """The index of a torch package: one pickle is the object, several are a dict by their paths.

    Raises:
        FormatError: Damaged, or without a pickle.
    """
    storages = Storages(archive, ".data/", ".storage")
    modules: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, record in archive.below().items():
        if name.startswith(".data/") or name.endswith(".py") or not _begins_a_pickle(archive, record):
            continue
        data = index_bytes(archive, record)
        ids = _Ids(archive, storages, modules)
        try:
            found[name] = read_pickle(data, persistent_load=ids.load, limits=archive.limits, base=record.offset)[0]
        except FormatError:
            if name.endswith(".pkl"):
                raise
    if not found:
        raise FormatError("the file is a torch package without a pickle: there are no weights in it", offset=0)
    tree = next(iter(found.values())) if len(found) == 1 else found
    return Index("torch package", tree, archive.source, records=archive.records, metadata={"pickles": list(found)})


def _begins_a_pickle(archive: Archive, record: Record) -> bool:
    if record.compressed:
        return record.name.endswith(".pkl")
    return archive.source.read(record.offset, min(record.nbytes, 1)) == b"\x80"


class _Ids:
    """Persistent ids: storages, and calls that packages make of objects of their own (`reduce_package`).

    Args:
        modules: Script modules by their numbers, each read once for all pickles of the package.
    """

    def __init__(self, archive: Archive, storages: Storages, modules: dict[str, Any]) -> None:
        self._archive = archive
        self._storages = storages
        self._reduced: dict[Any, Any] = {}
        self._modules = modules

    def _call(self, func: Any, args: tuple[Any, ...]) -> Any:
        """An inert call, or the script module that stands in the package."""
        known = isinstance(func, type) and issubclass(func, Inert)
        if known and func.name == "unpackage_script_module" and args and type(args[0]) is str:
            if args[0] not in self._modules:
                self._modules[args[0]] = read_packaged(self._archive, args[0])
            if self._modules[args[0]] is not None:
                return self._modules[args[0]]
        return (func if known else inert_class("torch.package", "reduced"))(*args)

    def load(self, pid: Any) -> Any:
        """The storage, or the inert call."""
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "reduce_package" and type(pid[3]) is tuple:
            key, func, args = pid[1:]
            if type(key) not in (int, str):
                raise FormatError("a persistent id that torch does not write")
            if key not in self._reduced:
                self._reduced[key] = self._call(func, args)
            return self._reduced[key]
        if type(pid) is tuple and len(pid) > 2 and type(pid[2]) is int:  # storages are numbered
            pid = (*pid[:2], str(pid[2]), *pid[3:])
        return self._storages.load(pid)
