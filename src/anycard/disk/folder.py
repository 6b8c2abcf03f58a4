"""A folder as a source: its files are opened by plain relative names. Knows no tensors."""

from __future__ import annotations

import errno
import os
import stat

from anycard.disk.source import Source, open_file
from anycard.errors import FormatError

_MOST_LISTED = 100_000
_DEEPEST = 2
_MOST_OPEN = 200  # files that stay open; a process may have 1,024
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)


class Folder(Source):
    """A folder; has no bytes of its own. Closing it closes the files that were opened through it.

    Attributes:
        path: The folder's path.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, 0)
        self.path = self._path = path
        self._opened: dict[str, Source] = {}

    def read_into(self, offset: int, view: memoryview) -> None:
        raise FormatError(f"{self.name} is a folder, not a checkpoint file", path=self.name)

    def open(self, name: str) -> Source:
        """A file of the folder, or a folder in it; each is opened once.

        Raises:
            FormatError: The name is no plain relative path, there is no such file, or it is a device or a pipe.
        """
        found = self._opened.get(name)
        if found is None:
            found = self._opened[name] = self._open(name)
        return found

    def _open(self, name: str) -> Source:
        path = os.path.join(self._path, *plain_parts(name, self.name))  # noqa: PTH118
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - symlinks in the user's own folder are followed
        except (OSError, ValueError) as error:  # ValueError: characters that the file system cannot have
            if isinstance(error, OSError) and error.errno not in _NO_FILE:
                raise
            raise FormatError(f"{self.name} has no file {name[:200]!r}", path=self.name, name=name) from None
        if stat.S_ISDIR(mode):
            return Folder(path)
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path} is no regular file", path=path, name=name)
        return open_file(path) if len(self._opened) < _MOST_OPEN else BriefSource(path)

    def adopt(self, source: Source) -> None:
        """Close this with the folder."""
        self._opened[f"/{len(self._opened)}"] = source

    def has(self, name: str) -> bool:
        """A regular file of that name is there."""
        try:
            path = os.path.join(self._path, *plain_parts(name, self.name))  # noqa: PTH118
            return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
        except (FormatError, OSError, ValueError):
            return False

    def files(self, depth: int = 0) -> dict[str, int]:
        """Relative name -> size of the regular files, sorted; those of folders in it too, down to a depth.

        Raises:
            FormatError: More files than any checkpoint has.
        """
        found: dict[str, int] = {}
        _list(self._path, "", min(depth, _DEEPEST), found)
        return dict(sorted(found.items()))

    def close(self) -> None:
        for source in self._opened.values():
            source.close()


def home_of(source: Source) -> Folder | None:
    """The folder that a file lies in; None for an open file, and for what lies in another file."""
    return None if source.path is None else Folder(os.path.dirname(source.path) or ".")  # noqa: PTH120


class BriefSource(Source):
    """A file that is opened for as long as it is read, as there may be many."""

    def __init__(self, path: str) -> None:
        super().__init__(path, os.stat(path).st_size)  # noqa: PTH116
        self.path = path

    def read_into(self, offset: int, view: memoryview) -> None:
        source = open_file(self.name)
        try:
            source.read_into(offset, view)
        finally:
            source.close()


def _list(path: str, prefix: str, depth: int, found: dict[str, int]) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            if len(found) >= _MOST_LISTED:
                raise FormatError(f"{path} has more than {_MOST_LISTED:,} files", path=path)
            try:
                held = entry.stat()
            except OSError:  # a symlink to nothing
                continue
            if stat.S_ISREG(held.st_mode):
                found[prefix + entry.name] = held.st_size
            elif depth and stat.S_ISDIR(held.st_mode) and not entry.name.startswith("."):
                _list(entry.path, f"{prefix}{entry.name}/", depth - 1, found)


def plain_parts(name: str, owner: str) -> list[str]:
    """The parts of a relative path that stays below its folder.

    Raises:
        FormatError: An absolute path, one with `..`, a drive, or characters that no file name has.
    """
    parts = name.split("/")
    odd = any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name or len(name) > 4096
    if odd or (os.name == "nt" and ":" in name):
        raise FormatError(f"{owner} names {name[:200]!r}, which is no plain path below its own folder", path=owner)
    return parts
