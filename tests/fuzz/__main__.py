"""Fuzz every reader for a bounded time: `make fuzz SECONDS=60`.

    python -m fuzz [--seconds 60] [--jobs 2] [--reader NAME]... [--work FOLDER]     # within tests/

A process for each reader, so that a crash or a hang is one reader's find. The corpus stays in the work folder, and
the next run goes on from it. Finds are made smaller and put into `fuzz/finds.tsv`, which `make test` holds; the exit
status is 1 where there are new ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fuzz.finds import Find, keep, packed
from fuzz.mutating import dictionary
from fuzz.readers import READERS

HERE = Path(__file__).parent
_LARGEST = 6_000  # characters of a row; what stays larger is left in the work folder, and named
_STARTS = 20  # of a reader whose process ends before its time
_HANG = 60


class Row(NamedTuple):
    """What came of one reader."""

    reader: str
    runs: int
    features: int
    inputs: int
    finds: list[str]


def fuzzed(reader: str, home: Path, seconds: float) -> Row:
    """One reader for a time; its process is started again where a crash or a hang ends it."""
    for name in ("corpus", "finds"):
        (home / name).mkdir(parents=True, exist_ok=True)
    until, said, runs = time.monotonic() + seconds, "", 0
    for _ in range(_STARTS):
        left = round(until - time.monotonic())
        if left < 1:
            break
        one = _started(reader, home, left)
        runs += max(map(int, re.findall(r"^#(\d+)\t", one, re.MULTILINE)), default=0)
        said += one
    finds = [text for file in sorted((home / "finds").iterdir()) if (text := _kept(file, reader))]
    features = [int(n) for n in re.findall(r" ft: (\d+)", said)]
    inputs = len(list((home / "corpus").iterdir()))
    (home / "log").write_text(said, encoding="utf-8")
    return Row(reader, runs, max(features, default=0), inputs, finds)


def _started(reader: str, home: Path, seconds: int) -> str:
    command = [sys.executable, "-m", "fuzz.worker", str(home), str(seconds)]
    folder = ["folder"] if READERS[reader].folder else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    said = subprocess.run(command + folder, **pipes, check=False, cwd=HERE.parent).stdout.decode("utf-8", "replace")
    if " ft: " not in said or "Uncaught Python exception" in said:  # ours: those of readers are caught
        raise SystemExit(f"the fuzzer of {reader} is wrong: {said[-2000:]}")
    return said


def _kept(file: Path, reader: str) -> str:
    """A find, looked at without instrumentation and made smaller; what there is to say of it."""
    kind = "ended" if file.name.startswith("ended_") else ""
    command = [sys.executable, "-m", "fuzz.minimising", str(file), reader, "60"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, cwd=HERE.parent, timeout=60 + _HANG)
        kind, detail, *_ = json.loads(done.stdout) if done.returncode == 0 else ("ends the process", "")
    except subprocess.TimeoutExpired:
        kind, detail = "hangs", ""
    if kind == "well":  # slow under instrumentation only
        file.unlink()
        return ""
    data = file.read_bytes()
    find = Find(f"{kind} {detail}".strip(), reader, "folder" if READERS[reader].folder else "file", packed(data))
    if len(find.packed) > _LARGEST:
        return f"{find.name}: {len(data):,} bytes, too large for the table: {file}"
    return f"{find.name}: {len(data):,} bytes, {'put into' if keep(find) else 'one like it is in'} finds.tsv"


def _table(rows: list[Row], seconds: float) -> str:
    lines = [f"{'reader':<16}{'inputs tried':>14}{'a second':>10}{'features':>10}{'corpus':>8}  finds"]
    for row in rows:
        head = f"{row.reader:<16}{row.runs:>14,}{row.runs / seconds:>10,.0f}{row.features:>10,}{row.inputs:>8,}"
        lines.append(f"{head}  {'; '.join(row.finds) or 'none'}")
    return "\n".join(lines)


def main() -> int:
    """Seeds, workers, finds, table."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, divided over the readers")
    parser.add_argument("--jobs", type=int, default=2, help="readers at once")
    parser.add_argument("--reader", action="append", choices=READERS, help="only this one")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "fuzz", help="corpus, finds and logs")
    given = parser.parse_args()
    work: Path = given.work.resolve()
    readers = given.reader or list(READERS)
    seconds = max(given.seconds * given.jobs / len(readers), 1.0)
    work.mkdir(parents=True, exist_ok=True)
    (work / "dictionary").write_text(dictionary(), encoding="ascii")
    print("making the seeds", flush=True)
    subprocess.run([sys.executable, "-W", "ignore", "-m", "fuzz.readers", str(work)], check=True, cwd=HERE.parent)

    def one(reader: str) -> Row:
        row = fuzzed(reader, work / reader, seconds)
        print(f"{reader}: {row.runs:,} inputs, {len(row.finds)} finds", flush=True)
        return row

    print(f"{len(readers)} readers, {seconds:.0f} s each, {given.jobs} at once", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(one, readers))
    print(_table(rows, seconds))
    return any(row.finds for row in rows)


if __name__ == "__main__":
    sys.exit(main())
