"""Replace a file by a whole new one or not at all: temporary file, fsync, rename, fsync of the folder."""

# Paths of any kind, without importing pathlib.
# ruff: noqa: PTH101, PTH105, PTH108, PTH112, PTH116, PTH118, PTH119, PTH120, PTH208
from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO

from anycard.errors import CheckpointError

_SUFFIX = ".anycard-tmp"
_NAME_MOST = 180  # bytes of the target's name that the temporary name repeats; names end at 255
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_BUSY = (errno.EAGAIN, errno.EACCES)
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write and read; it takes the target's place when the block ends without an exception.

    A symlink is followed. An existing target keeps its mode, a new one gets the umask's. What dead
    processes left beside the same target is removed; what living ones are writing stays.

    Raises:
        FileNotFoundError: The folder is not there.
        IsADirectoryError: The target is a folder.
        CheckpointError: The target is a device, pipe or socket.
        OSError: The disk failed or is full; the old file stays.
    """
    target = os.path.realpath(os.fsdecode(path))
    mode = _target_mode(target)
    _clear_litter(target)
    temporary, fd = _create(target, mode)
    file = os.fdopen(fd, "w+b")
    try:
        yield file
        _finish(file, temporary, target, mode)
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = os.fsdecode(path)
        raise


def _target_mode(target: str) -> int | None:
    """The existing target's mode, or None where there is none."""
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "the folder to save into is not there", folder)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder cannot be replaced by a file", target)
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{target} is no regular file: it cannot be replaced", path=target)
    return stat.S_IMODE(mode)


def _finish(file: BinaryIO, temporary: str, target: str, mode: int | None) -> None:
    file.flush()
    if mode is not None:
        os.chmod(temporary, mode)
    os.fsync(file.fileno())
    if sys.platform == "win32":  # an open file cannot be renamed there
        file.close()
    os.replace(temporary, target)  # still locked: nobody may take it for litter
    _sync_folder(os.path.dirname(target))
    file.close()


def _sync_folder(folder: str) -> None:
    if sys.platform == "win32":
        return
    try:
        fd = os.open(folder, os.O_RDONLY | _BINARY)
    except PermissionError:  # a folder that may be written and not listed
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _stem(target: str) -> str:
    name = os.fsencode(os.path.basename(target))
    return "." + os.fsdecode(name[:_NAME_MOST]) + "."


def _create(target: str, mode: int | None) -> tuple[str, int]:
    """A locked temporary file that is still under its name."""
    folder, stem = os.path.dirname(target), _stem(target)
    while True:
        name = f"{stem}{os.getpid()}.{secrets.token_hex(6)}{_SUFFIX}"
        temporary = os.path.join(folder, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY
        try:
            fd = os.open(temporary, flags, 0o666 if mode is None else 0o600)
        except FileExistsError:
            continue
        try:
            mine = _lock(fd) is not False and _is_under(fd, temporary)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if mine:
            return temporary, fd
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _lock(fd: int) -> bool | None:
    """True: the lock is ours. False: another's. None: there are no locks here."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _is_under(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _clear_litter(target: str) -> None:
    pattern = re.compile(re.escape(_stem(target)) + r"\d+\.[0-9a-f]+" + re.escape(_SUFFIX), re.DOTALL)
    folder = os.path.dirname(target)
    try:
        names = os.listdir(folder)
    except OSError:  # a folder that may be written and not listed
        return
    for name in names:
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError):
                _clear(os.path.join(folder, name))


def _clear(path: str) -> None:
    """Remove one file whose owner is dead: its lock can be taken."""
    fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        if _lock(fd) is True and _is_under(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)
