"""One other scanner over many files, in its own environment: reads paths from stdin, prints path -> verdict as JSON.

    python foreign_scanners.py picklescan|fickling|modelscan|globals < paths

`globals` prints what the scanners installed there name as dangerous, from their own tables.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

FLAGGED, CLEAN, ERROR = "flagged", "clean", "error"


def picklescan(path: str) -> str:
    from picklescan.scanner import SafetyLevel, scan_file_path

    found = scan_file_path(path)
    if found.scan_err:
        return ERROR
    return CLEAN if all(g.safety == SafetyLevel.Innocuous for g in found.globals) else FLAGGED


def fickling(path: str) -> str:
    from fickling.analysis import Severity, check_safety
    from fickling.fickle import Pickled, StackedPickle
    from fickling.pytorch import PyTorchModelWrapper

    if zipfile.is_zipfile(path):
        pickles: Iterable[Pickled] = [PyTorchModelWrapper(path, force=True).pickled]
    else:
        with open(path, "rb") as file:  # noqa: PTH123
            pickles = StackedPickle.load(file)
    worst = max(check_safety(pickled).severity for pickled in pickles)
    return CLEAN if worst <= Severity.LIKELY_SAFE else FLAGGED


def modelscan(path: str) -> str:
    from modelscan.modelscan import ModelScan

    result = ModelScan().scan(path)
    if result.get("summary", {}).get("total_issues"):
        return FLAGGED
    return ERROR if result.get("errors") else CLEAN


def dangerous() -> list[tuple[str, str]]:
    """Module and name of every global that a table here calls dangerous; `*` is every name of a module."""
    found: set[tuple[str, str]] = set()

    def take(table: Any) -> None:
        for module, names in table.items():
            found.update((str(module), str(name)) for name in ([names] if isinstance(names, str) else names))

    with contextlib.suppress(ImportError):
        from picklescan import scanner

        take(scanner._unsafe_globals)
    with contextlib.suppress(ImportError):
        from modelscan.settings import DEFAULT_SETTINGS

        for level in DEFAULT_SETTINGS.get("unsafe_globals", {}).values():
            take(level)
    with contextlib.suppress(ImportError):
        from fickling import analysis, fickle

        take(analysis.UnsafeImportsML.UNSAFE_IMPORTS)
        take(dict.fromkeys((*analysis.UnsafeImportsML.UNSAFE_MODULES, *fickle.UNSAFE_IMPORTS), "*"))
    return sorted(found)


def main() -> None:
    """Scan each path with the scanner named on the command line; whatever it prints or raises stays its own."""
    which = sys.argv[1]
    if which == "globals":
        print(json.dumps(dangerous()))
        return
    scan: Callable[[str], str] = {"picklescan": picklescan, "fickling": fickling, "modelscan": modelscan}[which]
    verdicts = {}
    for path in sys.stdin.read().splitlines():
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                verdicts[path] = scan(path)
        except BaseException as error:  # noqa: BLE001 - a scanner that falls over has told nothing
            verdicts[path] = f"{ERROR} ({type(error).__name__})"
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
