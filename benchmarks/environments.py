"""Environments of their own for what is compared with anycard: nothing of it comes near anycard's."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def environment(folder: Path, name: str, packages: list[str], *, constrained: bool = True) -> Path:
    """The interpreter of an environment, made where it is not there yet, with `packages` in it.

    Raises:
        subprocess.CalledProcessError: pip cannot install them; `.stderr` says why.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        venv.create(folder / name, with_pip=True)
    if packages:
        install(python, ["-c", str(CONSTRAINTS), *packages] if constrained else packages)
    return python


def install(python: Path, arguments: list[str]) -> None:
    """`pip install`, quietly."""
    command = [str(python), "-m", "pip", "install", "-q", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
