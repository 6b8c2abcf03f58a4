"""Bytes that had to be made before they can be read anywhere: in a file without a name. Knows no tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable

from anycard.disk.source import FileSource


class TemporarySource(FileSource):
    """A file that is gone once it is closed, even if the process dies.

    Attributes:
        packed_nbytes: Size of the file on disk that it was made from.
    """

    def __init__(self, name: str, pieces: Iterable[bytes], packed_nbytes: int) -> None:
        import tempfile

        with tempfile.TemporaryFile() as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            fd = os.dup(file.fileno())
        super().__init__(name, fd, owned=True)
        self.packed_nbytes = packed_nbytes
