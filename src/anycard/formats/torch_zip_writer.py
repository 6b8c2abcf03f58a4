"""Write a torch zip: the pickle, one record a storage, and anycard's mark (which torch ignores)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from anycard.containers.zip_writer import write_zip
from anycard.disk.pieces import Lazy, Piece
from anycard.limits import Limits


def write_torch_zip(
    file: BinaryIO, pickled: bytes, storages: Sequence[Piece], mark: Mapping[str, Any] | None, limits: Limits
) -> None:
    """Write the archive; record names start with `archive/`, whatever the file is called."""
    records: list[tuple[str, Piece]] = [
        ("archive/data.pkl", _text(pickled)),
        ("archive/.format_version", _text(b"1")),
        ("archive/.storage_alignment", _text(b"64")),
        ("archive/byteorder", _text(b"little")),
    ]
    records += [(f"archive/data/{key}", piece) for key, piece in enumerate(storages)]
    records.append(("archive/version", _text(b"3\n")))
    if mark is not None:
        data = json.dumps(mark, sort_keys=True, separators=(",", ":")).encode()
        records.append(("archive/.anycard.json", _text(data)))
    write_zip(file, records, limits)


def _text(data: bytes) -> Piece:
    return Lazy(len(data), lambda: data)
