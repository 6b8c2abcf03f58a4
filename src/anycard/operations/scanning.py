"""`scan`: what loading a file the ordinary way would import and call. Nothing of it is run."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

from anycard.containers.inflated import Inflated, inflates_like_a_bomb, record_bytes
from anycard.containers.streams import inflated, kind_of
from anycard.containers.tar_directory import members
from anycard.containers.zip_directory import Record as ZipRecord
from anycard.containers.zip_directory import read_directory
from anycard.containers.zip_salvage import salvage
from anycard.disk.source import Source, StreamSource, WindowSource, open_source
from anycard.errors import FormatError
from anycard.formats.legacy_tar import is_legacy_tar
from anycard.formats.legacy_tar import read_index as read_legacy_tar
from anycard.formats.plain_pickle import budget_of
from anycard.limits import DEFAULT, Limits
from anycard.operations.archived_code import SETS_STATE, Archive, Context
from anycard.operations.looks import (
    NAMED,
    NUMPY,
    is_legacy,
    is_safetensors,
    is_storage,
    join,
    may_be_pickle,
    may_hold,
    objects_of,
    told_by,
    zips_within,
)  # fmt: skip
from anycard.operations.scan_report import Finding, ScanReport
from anycard.pickles.budget import Budget
from anycard.pickles.judging import CLEAN, INERT, RUNS, UNKNOWN, judge
from anycard.pickles.recording import Record, record_pickle

_DEEPEST = 5  # files within files
_FIRST = 1 << 20  # bytes of what is no pickle by its format that are followed at first
_MOST_PICKLES = 100_000


_PLAIN = Context()


def scan(path: str | os.PathLike[str], *, allow: Iterable[str] = (), limits: Limits = DEFAULT) -> ScanReport:
    """Say what every pickle in a file, or in the files of a folder, would import and call.

    Args:
        allow: Globals (`package.module.name`) that the caller vouches for.

    Raises:
        FileNotFoundError: There is no such file.
    """
    scanner = _Scanner(os.fspath(path), frozenset([allow] if isinstance(allow, str) else allow), limits)
    for file, label in _files(os.fspath(path)):
        try:
            source = open_source(file)
        except FormatError as error:
            scanner.report.unreadable.append(f"{label or file}: {error.args[0]}")
            continue
        try:
            if not is_storage(label):
                head = source.read(0, min(source.size, 16))
                scanner.file(source, label, int(bool(label)), told_by(label, head, _PLAIN) if label else _PLAIN)
        finally:
            source.close()
    order = (RUNS, UNKNOWN)
    scanner.report.findings.sort(key=lambda f: order.index(f.kind) if f.kind in order else len(order))
    return scanner.report


def _files(path: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(path):  # noqa: PTH112
        yield path, ""
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            full = os.path.join(folder, name)  # noqa: PTH118
            yield full, os.path.relpath(full, path)


class _Scanner:
    def __init__(self, path: str, allow: frozenset[str], limits: Limits) -> None:
        self.report = ScanReport(path)
        self._allow = allow
        self._limits = limits
        self._found: set[Finding] = set()

    def file(self, source: Source, where: str, depth: int, context: Context = _PLAIN) -> None:
        """A file, or bytes that a file holds."""
        head = source.read(0, min(source.size, 16))
        if depth > _DEEPEST:
            self._unreadable(where, "files within files, deeper than 5")
        elif is_safetensors(source, head, self._limits):
            self._disguised(source, where, depth)
        elif head[:2] == b"PK":
            self._zip(source, where, depth)
        elif kind_of(head):
            self._compressed(source, where, depth)
        elif source.size > 262 and source.read(257, 5) == b"ustar":
            self._disguised(source, where, depth)
            self._tar(source, where, depth)
        elif head.startswith(NUMPY):
            self._array(source, where, depth)
        elif may_be_pickle(head) or where.lower().endswith(NAMED) or not depth:
            self._stream(source, where, depth, context)

    def _compressed(self, source: Source, where: str, depth: int) -> None:
        try:
            data = b"".join(inflated(source, self._limits.index_nbytes))
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))
            return
        self._bytes(data, f"{where}/unpacked" if where else "unpacked", depth + 1)

    def _tar(self, source: Source, where: str, depth: int) -> None:
        if is_legacy_tar(source, self._limits):
            self._legacy_tar(source, where, depth)
            return
        try:
            for member in members(source, self._limits):
                inner = WindowSource(source, member.offset, member.nbytes)
                head = inner.read(0, min(inner.size, 16))
                context = told_by(member.name, head, _PLAIN)
                self.file(inner, join(where, member.name), depth + 1, context)
        except FormatError as error:
            self._unreadable(where, f"the tar archive cannot be followed to its end: {error.args[0]}")

    def _array(self, source: Source, where: str, depth: int) -> None:
        """A `.npy` file: an array of objects is a pickle behind the header."""
        objects = objects_of(source)
        if objects is None:
            self._unreadable(where, "the array's header cannot be followed")
        elif objects.size:
            self._stream(objects, where, depth, _PLAIN)

    def _legacy_tar(self, source: Source, where: str, depth: int) -> None:
        """A torch file before 0.1.10: its pickles stand among raw bytes, so the reader finds them."""

        def read(data: bytes, *, persistent_load: Any, limits: Limits, start: int = 0, base: int = 0,
                 budget: Budget | None = None) -> tuple[Any, int]:  # fmt: skip
            record = Record()
            try:
                return record_pickle(data, start, budget or Budget(limits, len(data)), record, persistent_load, base)
            finally:
                self._take(record, where, depth, _PLAIN)

        try:
            read_legacy_tar(source, self._limits, read)
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))

    def _zip(self, source: Source, where: str, depth: int) -> None:
        try:
            records = read_directory(source, self._limits)
        except FormatError as error:
            if not self._several_zips(source, where, depth):
                self._unreadable(where, str(error.args[0]))
                self._salvaged(source, where, depth)
            return
        archive = Archive(source, records, self._limits)
        self._sources(archive, where)
        for name, record in records.items():
            if is_storage(name) or name.lower().endswith(".py"):
                continue
            self._member(source, record, join(where, name), depth, archive.context(name))

    def _member(self, source: Source, record: ZipRecord, where: str, depth: int, context: Context) -> None:
        try:
            data = self._record(source, record, where)
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))
            if record.compressed or record.nbytes > self._limits.index_nbytes:
                return
            data = source.read(record.offset, record.nbytes)  # torch looks at no checksum
        if may_hold(where, data[:16]):
            self._bytes(data, where, depth + 1, told_by(where, data, context))

    def _salvaged(self, source: Source, where: str, depth: int) -> None:
        """What the records of an archive hold whose directory cannot be relied on."""
        try:
            for name, data in salvage(source, lambda name, head: may_hold(name, head), self._limits):
                self._bytes(data, join(where, name), depth + 1, told_by(name, data, _PLAIN))
        except FormatError as error:
            self._unreadable(where, str(error.args[0]))

    def _record(self, source: Source, record: ZipRecord, where: str) -> bytes:
        """A record's bytes; none of one that inflates like zeros and is no pickle."""
        if inflates_like_a_bomb(record):
            if may_hold(where, bytes(Inflated(source, record)[:16])):
                raise FormatError("the record inflates to far more than pickles do (a bomb?)")
            return b""
        return bytes(record_bytes(source, record, self._limits.index_nbytes))

    def _several_zips(self, source: Source, where: str, depth: int) -> bool:
        """Archives one after the other, as in a distributed checkpoint's `.distcp`; False for anything else."""
        parts = list(zips_within(source, self._limits))
        if len(parts) < 2 or depth >= _DEEPEST:
            return False
        for index, part in enumerate(parts):
            self._zip(part, f"{where}/{index}", depth + 1)
        return True

    def _sources(self, archive: Archive, where: str) -> None:
        """Code in the archive: TorchScript's runs on load where it sets state, a torch package's when imported."""
        for name, why in archive.runs():
            called = why == SETS_STATE
            self._find(Finding(why, RUNS, called, join(where, name), 0))

    def _bytes(self, data: bytes, where: str, depth: int, context: Context = _PLAIN) -> None:
        self.file(StreamSource(where, io.BytesIO(data)), where, depth, context)

    def _stream(self, source: Source, where: str, depth: int, context: Context) -> None:
        """Pickles one after the other from the start; what follows a torch file's five is its storages."""
        data = source.read(0, min(source.size, self._limits.index_nbytes))
        at = count = 0
        legacy = is_legacy(data)
        while at < len(data) and (not legacy or count < 5):
            if count and not may_be_pickle(data[at : at + 16]):
                break
            record = Record()
            try:
                record_pickle(data, at, budget_of(data, None, self._limits), record)
            except FormatError as error:
                named = {judge(*place) for place in record.globals}
                if context.tentative and not record.calls and RUNS not in named:
                    return  # text, or bytes, that begin like a pickle, and that nobody takes for one
                offset = f" at byte {error.offset:,}" if error.offset is not None else ""
                self._unreadable(where, f"the pickle cannot be followed to its end{offset}: {error.args[0]}")
                self._take(record, where, depth, context)
                return
            self._take(record, where, depth, context)
            at, count = record.end, count + 1
            if self.report.pickles > _MOST_PICKLES:
                self._unreadable(where, "more pickles than anything real holds")
                return
        if not count:
            self._unreadable(where, "neither a torch file nor a pickle")
        elif not legacy and at < len(data) and not context.tentative:
            self._unreadable(where, f"{len(data) - at:,} bytes after the last pickle, from byte {at:,}, are no pickle")

    def _disguised(self, source: Source, where: str, depth: int) -> None:
        """Another format, and yet a pickle: `pickle.load` runs it up to the first byte that no pickle has."""
        for most in (_FIRST, self._limits.index_nbytes):
            data, record, why = source.read(0, min(source.size, most)), Record(), ""
            try:
                record_pickle(data, 0, budget_of(data, None, self._limits), record)
            except FormatError as error:
                why = str(error.args[0])
            if "cut short" not in why or len(data) == source.size:
                break
        if record.globals:
            self._take(record, where, depth, _PLAIN)
            if why:
                self._unreadable(where, f"begins like a pickle, which cannot be followed to its end: {why}")

    def _take(self, record: Record, where: str, depth: int, context: Context) -> None:
        self.report.pickles += 1
        for (module, name), offset in record.globals.items():
            full = f"{module}.{name}"
            kind = judge(module, name, script=context.script)
            if (module, name) == ("torch.storage", "_load_from_bytes") and record.nested:
                kind = judge("torch", "Tensor")  # what it would load is scanned in its own right
            if module in context.harmless and (module, name) not in record.run:
                kind = INERT  # a class of a torch package's, whose source only defines
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
