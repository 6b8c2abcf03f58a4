"""The table of finds: each a small file that once broke the property, kept so that it never does again.

python tests/fuzz/finds.py FOLDER     # writes them as files, to look at
"""

from __future__ import annotations

import base64
import csv
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("finds.tsv")


class Find(NamedTuple):
    """A row of the table.

    Attributes:
        name: What was wrong: the kind, and where.
        reader: Which reader's fuzzer found it.
        folder: "folder" where the data is the zip of a folder, else "file".
        packed: The data, deflated, in base 85.
    """

    name: str
    reader: str
    folder: str
    packed: str

    @property
    def data(self) -> bytes:
        """The input."""
        return zlib.decompress(base64.b85decode(self.packed))


def packed(data: bytes) -> str:
    """An input as text for the table."""
    return base64.b85encode(zlib.compress(data, 9)).decode()


def finds() -> list[Find]:
    """All rows."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Find(*row) for row in csv.reader(file, "excel-tab", quoting=csv.QUOTE_NONE) if row]


def keep(find: Find) -> bool:
    """Add a row; False where one of its name and reader is there."""
    if any((old.name, old.reader) == (find.name, find.reader) for old in finds()):
        return False
    with TABLE.open("a", encoding="utf-8") as file:
        file.write("\t".join(find) + "\n")
    return True


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for found in finds():
        (folder / f"{found.reader} {found.name}".replace(" ", "_")).write_bytes(found.data)
