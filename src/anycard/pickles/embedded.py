"""What a plain pickle holds inside: long bytes by their place in the file, and whole torch files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.tensors import Storage

_LONG = 1_024  # shorter bytes stay in memory

# Reads a torch file out of bytes, which may lie at a place of a source; gives its object.
Opener = Callable[[bytes, "tuple[Source, int] | None"], Any]


class Embedded:
    """Bytes within one pickle. Those that lie in a file as they are will be read from there, when asked for.

    Attributes:
        source: Where the pickle lies, from its byte 0 on; None where it was made by decompressing.
    """

    def __init__(self, source: Source | None, opener: Opener) -> None:
        self.source = source
        self._opener = opener
        self._places: dict[int, tuple[object, int]] = {}
        self._opened: dict[int, tuple[bytes, Any]] = {}

    def note(self, data: object, nbytes: int, at: int) -> None:
        """Remember where in the pickle these bytes begin."""
        if nbytes >= _LONG and self.source is not None:
            self._places[id(data)] = (data, at)

    def place(self, data: object) -> tuple[Source, int] | None:
        """Where the bytes lie in the file, if they do."""
        found = self._places.get(id(data))
        return None if found is None or self.source is None else (self.source, found[1])

    def storage(self, key: str, data: bytes | bytearray, **more: Any) -> Storage:
        """The bytes as a storage: in the file where they lie there, else in memory."""
        place = self.place(data)
        if place is None:
            return Storage(key, len(data), data=data, **more)
        return Storage(key, len(data), source=place[0], offset=place[1], **more).settle()

    def open(self, data: bytes) -> Any:
        """The object of a torch file; the same bytes are read once."""
        known = self._opened.get(id(data))
        if known is None:
            place = self.place(data)
            try:
                known = self._opened[id(data)] = (data, self._opener(data, place))
            except FormatError as error:
                inside = error.offset if place is not None else None
                error.offset = None if inside is None or place is None else place[1] + inside
                raise
        return known[1]
