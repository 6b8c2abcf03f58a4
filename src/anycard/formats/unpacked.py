"""A torch zip that was unpacked into a folder: its files are the records."""

from __future__ import annotations

import os
from bisect import bisect_right

from anycard.containers.zip_directory import Record
from anycard.disk.folder import BriefSource, Folder
from anycard.disk.source import Source
from anycard.formats.index import Index
from anycard.formats.torch_zip import Archive, read_archive
from anycard.limits import Limits

MEMBERS = ("data.pkl", "version")  # what every archive of torch's has beside its tensors


def read_index(folder: Folder, limits: Limits) -> Index:
    """The index of the files of a folder, as of an archive.

    Raises:
        FormatError: A file is missing, damaged, or of another size than its storage has.
    """
    files = folder.files(depth=2)
    joined = _Joined(folder, files)
    records = {
        name: Record(name, joined.starts[i], size, size, None, False) for i, (name, size) in enumerate(files.items())
    }
    index = read_archive(Archive(joined, records, limits))
    index.source = folder
    return index


class _Joined(Source):
    """Files one after the other.

    Attributes:
        starts: Where each begins.
    """

    def __init__(self, folder: Folder, files: dict[str, int]) -> None:
        self.starts: list[int] = []
        at = 0
        for size in files.values():
            self.starts.append(at)
            at += size
        super().__init__(folder.name, at)
        self._paths = [os.path.join(folder.name, name) for name in files]  # noqa: PTH118

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > self.size:
            raise self._short(offset, len(view))
        index = bisect_right(self.starts, offset) - 1
        while len(view):
            end = self.starts[index + 1] if index + 1 < len(self.starts) else self.size
            part = view[: end - offset]
            if len(part):
                BriefSource(self._paths[index]).read_into(offset - self.starts[index], part)
            view, offset, index = view[len(part) :], end, index + 1
