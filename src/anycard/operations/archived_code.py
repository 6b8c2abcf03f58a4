"""The code that a zip archive of torch's carries: TorchScript, or a torch package's Python sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from anycard.containers.inflated import inflates_like_a_bomb, record_bytes
from anycard.containers.zip_directory import Record
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.limits import Limits
from anycard.operations import exported_code
from anycard.operations.packaged_code import modules_of, what_runs

SETS_STATE = "TorchScript __setstate__"
_SETSTATE = re.compile(rb"def(\s|\\)+__setstate__")


class Context(NamedTuple):
    """What a pickle lies in.

    Attributes:
        script: A TorchScript archive, whose classes are its own.
        harmless: A torch package's own modules that only define things.
        tentative: It may be no pickle at all: nothing tells it to be one.
        joblib: Its name says that only joblib loads it.
    """

    script: bool = False
    harmless: frozenset[str] = frozenset()
    tentative: bool = False
    joblib: bool = False


class Archive:
    """The records of one archive, and what kind of code they are."""

    def __init__(self, source: Source, records: dict[str, Record], limits: Limits) -> None:
        self._source = source
        self._records = records
        self._limits = limits
        tells = ".data/extern_modules"
        package = next((name for name in records if name.endswith(tells) and name.count("/") <= 2), None)
        self._folder = None if package is None else package[: -len(tells)]

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Module -> the first thing that it would run, "" for none; of a torch package only."""
        if self._folder is None:
            return {}
        modules = modules_of(self._records, self._folder)
        return {module: what_runs(self._code(name), modules) for module, name in modules.items()}

    @cached_property
    def _harmless(self) -> frozenset[str]:
        """One source may import another, so that all of them have to be harmless."""
        return frozenset(self._sources if not any(self._sources.values()) else ())

    def context(self, name: str) -> Context:
        """What a record's pickles are judged by; in a package, a module may be called as TorchScript's classes are."""
        if self._folder is not None:
            return Context(name.startswith(f"{self._folder}.data/ts_code/"), self._harmless)
        top = name.partition("/")[0] if "/" in name else ""
        return Context(f"{top}/constants.pkl".lstrip("/") in self._records)

    def runs(self) -> Iterator[tuple[str, str]]:
        """Record and what of it runs on load."""
        modules = {} if self._folder is None else modules_of(self._records, self._folder)
        for module, why in self._sources.items():
            if why:
                yield modules[module], f"Python source: {why}"
        scripts = [name for name in self._records if name.lower().endswith(".py") and name not in modules.values()]
        for name in scripts:
            if _SETSTATE.search(self._code(name)):
                yield name, SETS_STATE
        yield from self._exported()

    def _exported(self) -> Iterator[tuple[str, str]]:
        """The same of an exported program."""
        for name, record in self._records.items():
            if exported_code.COMPILED.search(name):
                yield name, "compiled code (AOTInductor)"
            elif name.endswith(".json") and b"expr_str" in (data := self._code(name)):
                try:
                    for text in exported_code.evaluated(data):
                        yield name, f"what sympy evaluates: {text[:80]}"
                except (ValueError, RecursionError):
                    yield name, f"{record.nbytes:,} bytes that are no JSON"

    def _code(self, name: str) -> bytes:
        record = self._records[name]
        try:
            if not inflates_like_a_bomb(record):
                return bytes(record_bytes(self._source, record, self._limits.index_nbytes))
        except FormatError:
            pass
        return b"def __setstate__("  # what cannot be looked at is not harmless
