"""`anycard scan` beside picklescan, fickling and modelscan, on attacks and on harmless files.

The attacks: those of the corpus; a call of every global that one of those scanners' own tables calls dangerous;
the opcodes and the damaged archives of the tests. The harmless files: the rest of the corpus. Exit 1 where anycard
misses an attack that another scanner catches, or calls a harmless file not clean.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from environments import ROOT, environment

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "corpus")]

import fetch  # noqa: E402

import test_scan  # noqa: E402
import test_scan_archives as archives  # noqa: E402
from anycard.operations.scanning import scan  # noqa: E402

# modelscan needs an older rich than the others, and an environment of its own.
SCANNERS = {
    "picklescan": ("others", ["picklescan==1.0.5", "fickling==0.1.12", "numpy", "torch"]),
    "fickling": ("others", []),
    "modelscan": ("modelscan", ["modelscan==0.8.8"]),
}
ATTACKS_OF_THE_CORPUS = ("exploits/", "_attack.", "malicious_system_call", "mixed_malicious_model")


def asked(python: Path, which: str, text: str = "") -> list[list[str]] | dict[str, str]:
    """What the other side of `foreign_scanners.py` says."""
    command = [str(python), str(HERE / "foreign_scanners.py"), which]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def made_attacks(folder: Path, globals_named: set[tuple[str, str]]) -> list[Path]:
    """Attack files of ours; nothing here calls what they name."""
    files = {f"opcodes {name}.pkl": data for name, data in test_scan.ATTACKS.items()}
    for module, name in sorted(globals_named):
        called = "anything" if name == "*" else name
        files[f"{module}.{called}.pkl".replace("/", "_")] = b"".join(
            [b"\x80\x04", _text(module), _text(called), b"\x93", _text("x"), b"\x85R."]
        )
    zipped = archives.archive_of({"archive/data.pkl": archives.EVIL, "archive/version": b"3\n"})
    files["zip.pt"] = zipped
    for damage in (archives.no_directory, archives.encrypted, archives.wrong_crc, archives.other_name_inside):
        files[f"zip {damage.__name__}.pt"] = damage(zipped)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def _text(text: str) -> bytes:
    return pickle.dumps(text, 4).removeprefix(b"\x80\x04\x95")[8:].removesuffix(b"\x94.")


def corpus() -> tuple[list[Path], list[Path]]:
    """Attacks, and harmless files, of what is in the cache."""
    rows = [row for row in fetch.rows() if row.there()]
    bad = [row.cached for row in rows if any(part in row.path for part in ATTACKS_OF_THE_CORPUS)]
    return bad, [row.cached for row in rows if row.cached not in bad]


def own(path: Path) -> str:
    """Our verdict, in the others' words."""
    report = scan(path)
    return "flagged" if report.bad else "error" if report.unreadable else "clean"


def main() -> int:
    """Print the table, and what was missed or flagged for nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=ROOT / ".bench")
    where = parser.parse_args().environments
    pythons = {
        name: environment(where, folder, packages, constrained=folder == "others")
        for name, (folder, packages) in SCANNERS.items()
    }
    named = {(m, n) for name in ("picklescan", "modelscan") for m, n in asked(pythons[name], "globals")}
    with tempfile.TemporaryDirectory() as folder:
        bad, good = corpus()
        bad += made_attacks(Path(folder), named)
        text = "\n".join(map(str, [*bad, *good]))
        verdicts = {name: asked(python, name, text) for name, python in pythons.items()}
        verdicts = {"anycard": {str(path): own(path) for path in [*bad, *good]}, **verdicts}
    return _report(verdicts, [str(path) for path in bad], [str(path) for path in good])


def _report(verdicts: dict[str, dict[str, str]], bad: list[str], good: list[str]) -> int:
    table = Table(title=f"{len(bad)} attacks, {len(good)} harmless files")
    for column in ("scanner", "attacks told", "missed", "not read", "harmless flagged", "not read"):
        table.add_column(column, justify="left" if column == "scanner" else "right")
    for name, told in verdicts.items():
        on_bad, on_good = (Counter(told[path].partition(" ")[0] for path in held) for held in (bad, good))
        counts = (on_bad["flagged"], on_bad["clean"], on_bad["error"], on_good["flagged"], on_good["error"])
        table.add_row(name, *map(str, counts))
    with (ROOT / "docs" / "scanners.txt").open("w") as file:
        for console in (Console(width=100), Console(width=100, file=file)):
            console.print(table)
    ours = verdicts["anycard"]
    missed = [p for p in bad if ours[p] == "clean"]
    missed += [p for p in bad if ours[p] == "error" and any(told[p] == "flagged" for told in verdicts.values())]
    false = [p for p in good if ours[p] != "clean"]
    for what, paths in (("MISSED", missed), ("FLAGGED FOR NOTHING", false)):
        for path in paths:
            print(f"{what}: {path}")
    return 1 if missed or false else 0


if __name__ == "__main__":
    sys.exit(main())
