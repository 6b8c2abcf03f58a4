"""A folder inside an archive: its members by their names below it, as if it were unpacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anycard.containers.zip_directory import Record
from anycard.disk.folder import Folder, plain_parts
from anycard.disk.source import Source
from anycard.errors import FormatError

_MOST_INFLATED = 200  # members that are inflated at once: each takes a file


class ArchivedFolder(Folder):
    """The members of an archive below a prefix ("", or a path that ends in a slash).

    Args:
        opened: Gives a member's bytes, where they lie or inflated.
    """

    def __init__(
        self, owner: Source, records: Mapping[str, Record], prefix: str, opened: Callable[[Record], Source]
    ) -> None:
        Source.__init__(self, owner.name, 0)
        self.records = {n.removeprefix(prefix): r for n, r in records.items() if n.startswith(prefix)}
        self._owner, self._unpack = owner, opened
        self._opened: dict[str, Source] = {}
        self._inflated = 0

    def _open(self, name: str) -> Source:
        record = self.records.get("/".join(plain_parts(name, self.name)))
        if record is None:
            raise FormatError(f"{self.name} has no file {name[:200]!r}", path=self.name, name=name)
        self._inflated += record.compressed
        if self._inflated > _MOST_INFLATED:
            message = f"{self.name} has more than {_MOST_INFLATED} compressed files of one checkpoint: unpack it first"
            raise FormatError(message, path=self.name)
        return self._unpack(record)

    def has(self, name: str) -> bool:
        return name in self.records

    def files(self, depth: int = 0) -> dict[str, int]:
        return {name: record.nbytes for name, record in self.records.items() if name.count("/") <= depth}

    def close(self) -> None:
        super().close()
        self._owner.close()
