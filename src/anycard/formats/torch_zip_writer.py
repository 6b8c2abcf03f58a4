"""PyTorch's zip format (since 1.6), as `torch.load` reads it: which records, in which order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from anycard.containers.zip_writer import ALIGNMENT, write_zip
from anycard.disk.pieces import Bytes, Piece
from anycard.limits import Limits

ROOT = "archive"
MARK = ".anycard.json"


def write_torch_zip(
    file: BinaryIO, pickled: bytes, storages: Sequence[Piece], mark: Mapping[str, Any] | None, limits: Limits
) -> None:
    """Write the pickle, the storages (keys "0", "1", …) and anycard's own record, if any.

    Record names never depend on the file's name, so the same weights give the same bytes.
    """
    records: list[tuple[str, Piece]] = [
        ("data.pkl", Bytes(pickled)),
        (".format_version", Bytes(b"1")),
        (".storage_alignment", Bytes(str(ALIGNMENT).encode())),
        ("byteorder", Bytes(b"little")),
        *((f"data/{key}", piece) for key, piece in enumerate(storages)),
        ("version", Bytes(b"3\n")),
    ]
    if mark is not None:
        records.append((MARK, Bytes(_compact(mark))))
    write_zip(file, [(f"{ROOT}/{name}", piece) for name, piece in records], limits)


def _compact(mark: Mapping[str, Any]) -> bytes:
    text = json.dumps(mark, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()
