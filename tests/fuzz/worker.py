"""One reader under atheris: coverage of anycard alone, mutations within archives, each find kept by its fault.

    python tests/fuzz/worker.py FOLDER SECONDS [folder]     # FOLDER has `seeds`; `corpus`, `finds` are filled

A find does not end the process, so that one fault does not hide the others; a hang or a crash does.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import re
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["anycard"]):
    import anycard

    for _found in pkgutil.walk_packages(anycard.__path__, "anycard."):
        if not re.match(r"anycard\.(torch|matrix|cli|__main__)\b", _found.name):
            importlib.import_module(_found.name)

from fuzz.ends import End, end_of
from fuzz.mutating import mutated

SLOW_INPUT = 30  # seconds, then it is a hang


class Worker:
    """Tries inputs, and keeps the smallest that shows each fault."""

    def __init__(self, home: Path, folder: bool) -> None:
        self._finds = home / "finds"
        self._folder = folder
        self._known: dict[str, int] = {}
        self._count = 0

    def one(self, data: bytes) -> None:
        """An input."""
        self._count += 1
        end = end_of(data, self._folder, twice=self._count % 4 == 0)
        if end.kind != "well":
            self._keep(data, end)

    def _keep(self, data: bytes, end: End) -> None:
        name = re.sub(r"\W+", "_", f"{end.kind} {end.detail}").strip("_")
        if len(data) < self._known.get(name, 1 << 40):
            self._known[name] = len(data)
            (self._finds / name).write_bytes(data)

    def mutator(self, data: bytes, most: int, seed: int) -> bytes:
        """What libFuzzer calls for a new input."""
        return mutated(data, most, random.Random(seed), atheris.Mutate, self._folder)


def main(home: Path, seconds: str, folder: bool) -> None:
    """Fuzz; ends the process."""
    worker = Worker(home, folder)
    options = [
        f"-max_total_time={seconds}", f"-timeout={SLOW_INPUT}", "-rss_limit_mb=4096", "-max_len=200000",
        "-len_control=0", "-print_final_stats=1", f"-dict={home.parent / 'dictionary'}",
        f"-artifact_prefix={home / 'finds'}/ended_", str(home / "corpus"), str(home / "seeds"),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], worker.one, custom_mutator=worker.mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3)
