"""Replace a file atomically: a temporary file beside it, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: a file that is open cannot be removed there, which serves as the lock
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".anycard-tmp"


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write; it takes the target's place when the block ends, and not before.

    Raises:
        FileNotFoundError: The folder is not there.
        IsADirectoryError: The target is a folder.
        OSError: The disk failed or is full; the old file is as it was.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} is not there")
    _clear_leftovers(target)
    temporary, file = _create(target)
    try:
        with file:
            yield file
            file.flush()
            _set_mode(file, target)
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def _create(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = target.with_name(f".{target.name[:180]}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        # Another process may have taken the new file for a leftover before it was locked.
        if temporary.exists():
            return temporary, os.fdopen(fd, "w+b")
        os.close(fd)


def _clear_leftovers(target: Path) -> None:
    """Remove temporary files of this target whose process is gone: nobody holds their lock."""
    for leftover in target.parent.glob(f".{_escaped(target.name[:180])}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if fcntl is None:
                leftover.unlink()
                continue
            fd = os.open(leftover, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(fd)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _set_mode(file: BinaryIO, target: Path) -> None:
    if target.exists() and hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
