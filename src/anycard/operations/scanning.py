"""`scan`: what loading a file the ordinary way would import and call. Nothing of it is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from anycard.arguments import allowed, path_text
from anycard.containers.inflated import Inflated, inflates_like_a_bomb, record_bytes
from anycard.containers.streams import begun, by_chance, inflated
from anycard.containers.tar_directory import members
from anycard.containers.zip_directory import Record as ZipRecord
from anycard.containers.zip_directory import read_directory
from anycard.containers.zip_salvage import salvage
from anycard.disk.source import MemorySource, Source, WindowSource, open_source
from anycard.errors import FormatError
from anycard.formats import legacy_tar
from anycard.formats.plain_pickle import budget_of
from anycard.limits import DEFAULT, Limits
from anycard.operations.archived_code import SETS_STATE, Archive, Context
from anycard.operations.looks import (
    begins_loaded,
    behind_header,
    formats_of,
    is_legacy,
    is_raw,
    join,
    old_joblib,
    raw_folders,
    starts_pickle,
    tells,
    told_by,
    zips_within,
)  # fmt: skip
from anycard.operations.other_readers import finds_others
from anycard.operations.scan_report import Finding, ScanReport
from anycard.pickles.budget import Budget
from anycard.pickles.judging import CLEAN, INERT, RUNS, UNKNOWN, judge
from anycard.pickles.outline import Outline, outline
from anycard.pickles.recording import Record, record_pickle

_DEEPEST = 5  # files within files
_HEAD = 512  # bytes that tell a format
_FIRST = 64 << 10  # bytes that are looked at of a record that inflates like zeros
_MOST_PICKLES = 100_000


_PLAIN = Context()


def scan(
    path: str | os.PathLike[str], *, allow: str | Iterable[str] | None = (), limits: Limits = DEFAULT
) -> ScanReport:
    """Say what every pickle in a file, or in the files of a folder, would import and call.

    Args:
        allow: Globals (`package.module.name`) that the caller vouches for.

    Raises:
        FileNotFoundError: There is no such file.
    """
    scanner = _Scanner(path_text(path), frozenset(allowed(allow)), limits)
    if os.path.isdir(scanner.report.path):  # noqa: PTH112
        _scan_folder(scanner)
    else:
        _scan_file(scanner, scanner.report.path, "")
    order = (RUNS, UNKNOWN)
    scanner.report.findings.sort(key=lambda f: order.index(f.kind) if f.kind in order else len(order))
    return scanner.report


def _scan_folder(scanner: _Scanner) -> None:
    """Every file that a program which opens the folder could come to; what cannot be read is said, and left."""
    top = scanner.report.path

    def refuse(error: OSError) -> None:
        where = os.path.relpath(error.filename, top)
        scanner.report.unreadable.append(f"{top if where == '.' else where}: {error.strerror}")

    for full in _files(top, refuse):
        try:
            _scan_file(scanner, full, os.path.relpath(full, top))
        except OSError as error:  # a link to nothing, or what this user may not read
            error.filename = full
            refuse(error)


def _files(top: str, refuse: Callable[[OSError], None]) -> Iterator[str]:
    """The files of a folder and of those in it, through links too; each folder once, as links may lead back."""
    seen = set()
    for folder, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        held = os.stat(folder)  # noqa: PTH116
        if (held.st_dev, held.st_ino) in seen:
            folders.clear()
            continue
        seen.add((held.st_dev, held.st_ino))
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))  # noqa: PTH118


def _scan_file(scanner: _Scanner, file: str, label: str) -> None:
    try:
        source = open_source(file)
    except FormatError as error:
        scanner.report.unreadable.append(f"{label or file}: {error.args[0]}")
        return
    try:
        if label:
            scanner.member(source, label, label, 1, _PLAIN)
        else:
            named = told_by(file, b"", _PLAIN)
            scanner.file(source, "", 0, named._replace(tentative=False))
    finally:
        source.close()


def _is_told(source: Source) -> bool:
    """Bytes that may be anything are pickles; behind the first one, which is its magic number, torch knows ids."""
    first = outline(source, one=True, ids=False)
    later = outline(source, first.end) if 0 < first.end < source.size else first
    return any(tells(found, source.size) for found in (outline(source, ids=False), later))


class _Scanner:
    def __init__(self, path: str, allow: frozenset[str], limits: Limits) -> None:
        self.report = ScanReport(path)
        self._allow = allow
        self._limits = limits
        self._found: set[Finding] = set()

    def member(self, source: Source, name: str, where: str, depth: int, context: Context) -> None:
        """A file that something holds, by the name that it has there."""
        head = source.read(0, min(source.size, _HEAD))
        self.file(source, where, depth, told_by(name, head, context))

    def file(self, source: Source, where: str, depth: int, context: Context = _PLAIN) -> None:
        """A file, or bytes that a file holds: as each format that it may be taken for, and as a pickle."""
        formats = formats_of(source, source.read(0, min(source.size, _HEAD)), self._limits)
        maybe = context._replace(tentative=True) if formats else context
        if depth > _DEEPEST:
            if formats or not context.tentative or tells(outline(source, ids=False), source.size):
                self._unreadable(where, "files within files, deeper than 5")
            return
        looks = {
            "zip": self._zip, "packed": self._compressed, "joblib": self._old_joblib, "lz4": self._lz4,
            "npy": self._array, "tar": self._tar,
        }  # fmt: skip
        for name in formats:
            if name in looks:
                looks[name](source, where, depth, context)
        self._stream(source, where, depth, maybe)

    def _compressed(self, source: Source, where: str, depth: int, context: Context) -> None:
        """What streams inflate to; up to damage, as a loader may have read that far."""
        data = bytearray()
        try:
            for piece in inflated(source, self._limits.index_nbytes, whole=True):
                data += piece
        except FormatError as error:
            maybe = context.tentative and by_chance(source.read(0, min(source.size, 8)))
            chance = begun(source) if maybe else None
            if chance is None:
                self._unreadable(where, str(error.args[0]))
            data = data if chance is None else bytearray(chance)
            if not data:
                return
        self._bytes(bytes(data), join(where, "unpacked"), depth + 1, context)

    def _old_joblib(self, source: Source, where: str, depth: int, context: Context) -> None:
        self.file(old_joblib(source), join(where, "unpacked"), depth + 1, context)

    def _lz4(self, source: Source, where: str, depth: int, context: Context) -> None:
        self._unreadable(where, "the file is lz4-compressed, which is not looked into: unpack it first")

    def _tar(self, source: Source, where: str, depth: int, context: Context) -> None:
        """Members whatever they are called; of a torch file before 0.1.10, three are what its reader finds in them."""
        followed = legacy_tar.is_legacy_tar(source, self._limits) and self._legacy_tar(source, where, depth)
        try:
            for member in members(source, self._limits):
                if not followed or member.name not in legacy_tar.MEMBERS:
                    inner = WindowSource(source, member.offset, member.nbytes)
                    self.member(inner, member.name, join(where, member.name), depth + 1, _PLAIN)
        except FormatError as error:
            self._unreadable(where, f"the tar archive cannot be followed to its end: {error.args[0]}")

    def _array(self, source: Source, where: str, depth: int, context: Context) -> None:
        """A `.npy` file: an array of objects is a pickle behind the header, which can be spelled in many ways."""
        held = behind_header(source)
        if held is None:
            self._unreadable(where, "the array's header cannot be followed")
        elif held[0].size:
            self._stream(held[0], where, depth, _PLAIN._replace(tentative=not held[1]))

    def _legacy_tar(self, source: Source, where: str, depth: int) -> bool:
        """Its pickles stand among raw bytes, so the reader finds them; False where it does not."""

        def read(data: bytes, *, persistent_load: Any, limits: Limits, start: int = 0, base: int = 0,
                 budget: Budget | None = None) -> tuple[Any, int]:  # fmt: skip
            record = Record()
            try:
                return record_pickle(data, start, budget or Budget(limits, len(data)), record, persistent_load, base)
            finally:
                self._take(record, where, depth, _PLAIN)

        try:
            legacy_tar.read_index(source, self._limits, read)
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))
            return False
        return True

    def _zip(self, source: Source, where: str, depth: int, context: Context) -> None:
        try:
            records = read_directory(source, self._limits)
        except FormatError as error:
            if not self._several_zips(source, where, depth, context):
                self._unreadable(where, str(error.args[0]))
                self._salvaged(source, where, depth)
            return
        if finds_others(source, records.values()):
            self._unreadable(where, "readers of zip archives find other members in it than torch does")
            self._salvaged(source, where, depth)
        archive = Archive(source, records, self._limits)
        self._sources(archive, where)
        folders = raw_folders(records)
        for name, record in records.items():
            if not is_raw(name, folders) or self._is_loaded(source, record):
                self._member(source, record, join(where, name), depth, archive.context(name))

    def _is_loaded(self, source: Source, record: ZipRecord) -> bool:
        """A storage's bytes that another loader would take for more: numpy reads any member that begins so."""
        try:
            if record.compressed:
                return begins_loaded(bytes(Inflated(source, record)[:_HEAD]))
            return begins_loaded(source.read(record.offset, min(record.nbytes, _HEAD)))
        except FormatError:
            return False

    def _member(self, source: Source, record: ZipRecord, where: str, depth: int, context: Context) -> None:
        held: Source = WindowSource(source, record.offset, record.stored_nbytes)
        large = record.nbytes > self._limits.index_nbytes
        try:
            if record.compressed or not large:
                held = MemorySource(where, self._record(source, record, where, context))
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))
            if record.compressed:
                return  # of one that is stored, torch looks at no checksum
        self.member(held, where, where, depth + 1, context)

    def _record(self, source: Source, record: ZipRecord, where: str, context: Context) -> bytes:
        """A record's bytes; the first ones of one that inflates like zeros."""
        if not inflates_like_a_bomb(record):
            return bytes(record_bytes(source, record, self._limits.index_nbytes))
        data = bytes(Inflated(source, record)[:_FIRST])
        if not told_by(where, data, context).tentative or outline(MemorySource(where, data), ids=False).short:
            self._unreadable(where, "the record inflates to far more than pickles do (a bomb?)")
        return data

    def _salvaged(self, source: Source, where: str, depth: int) -> None:
        """What the records of an archive hold whose directory cannot be relied on."""
        try:
            for name, held in salvage(source, self._limits):
                self.member(held, name, join(where, name), depth + 1, _PLAIN)
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))

    def _several_zips(self, source: Source, where: str, depth: int, context: Context) -> bool:
        """Archives one after the other, as in a distributed checkpoint's `.distcp`; False for anything else."""
        parts = list(zips_within(source, self._limits))
        if len(parts) < 2 or depth >= _DEEPEST:
            return False
        for index, part in enumerate(parts):
            self._zip(part, f"{where}/{index}", depth + 1, context)
        return True

    def _sources(self, archive: Archive, where: str) -> None:
        """Code in the archive: TorchScript's runs on load where it sets state, a torch package's when imported."""
        for name, why in archive.runs():
            called = why == SETS_STATE
            self._find(Finding(why, RUNS, called, join(where, name), 0))

    def _bytes(self, data: bytes, where: str, depth: int, context: Context = _PLAIN) -> None:
        self.file(MemorySource(where, data), where, depth, context)

    def _stream(self, source: Source, where: str, depth: int, context: Context) -> None:
        """Pickles one after the other from the start; what follows a torch file's five is its storages."""
        if context.tentative and not _is_told(source):
            return
        data = source.read(0, min(source.size, self._limits.index_nbytes))
        at = count = 0
        legacy = is_legacy(data)
        while at < len(data) and (not legacy or count < 5):
            record = Record()
            try:
                record_pickle(data, at, budget_of(data, None, self._limits), record)
            except FormatError as error:
                more = Outline() if error.cut_short else outline(source, at)
                record.globals = {**more.globals, **record.globals}
                if count and not record.globals and not starts_pickle(data, at):
                    break
                offset = f" at byte {error.offset:,}" if error.offset is not None else ""
                self._unreadable(where, f"the pickle cannot be followed to its end{offset}: {error.args[0]}")
                self._take(record, where, depth, context)
                return
            if record.arrays and not context.joblib:  # other loaders take their bytes for opcodes
                more = outline(source, at, one=True)
                record.run |= more.globals.keys() - record.globals.keys()
                record.followed.clear()
                record.globals = {**more.globals, **record.globals}
            self._take(record, where, depth, context)
            at, count = record.end, count + 1
            if self.report.pickles > _MOST_PICKLES:
                self._unreadable(where, "more pickles than anything real holds")
                return
        if not count:
            self._unreadable(where, "neither a torch file nor a pickle")
        elif not legacy and at < len(data) and not context.tentative:
            self._unreadable(where, f"{len(data) - at:,} bytes after the last pickle, from byte {at:,}, are no pickle")

    def _take(self, record: Record, where: str, depth: int, context: Context) -> None:
        self.report.pickles += 1
        for (module, name), offset in record.globals.items():
            full = f"{module}.{name}"
            kind = judge(module, name, script=context.script)
            if (module, name) == ("torch.storage", "_load_from_bytes") and record.only_followed(module, name):
                kind = judge("torch", "Tensor")  # what it would load is scanned in its own right
            if module in context.harmless:  # a module of a torch package's, whose source only defines
                kind = INERT if record.only_made(module, name) else RUNS
            if kind in CLEAN or full not in self._allow:
                self._find(Finding(full, kind, (module, name) in record.calls, where, offset))
        for index, data in enumerate(record.nested):
            self._bytes(data, f"{where}/nested {index}", depth + 1)

    def _find(self, finding: Finding) -> None:
        if finding not in self._found:
            self._found.add(finding)
            self.report.findings.append(finding)

    def _unreadable(self, where: str, why: str) -> None:
        self.report.unreadable.append(f"{where}: {why}" if where else why)
