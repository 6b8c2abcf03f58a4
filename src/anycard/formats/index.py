"""What a format gives: its object as inert data, every range proved inside the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anycard.disk.source import Source


@dataclass
class Index:
    """A file's checked index.

    Attributes:
        format: The format's name.
        tree: The object: plain containers, `TensorInfo`, inert stubs.
        source: Where the bytes are.
        metadata: What the format says beside the tensors.
        mark: anycard's own record, or None in a file that others wrote.
        records: A zip's records by name.
    """

    format: str
    tree: Any
    source: Source
    metadata: dict[str, Any] = field(default_factory=dict)
    mark: dict[str, Any] | None = None
    records: dict[str, Any] = field(default_factory=dict)
