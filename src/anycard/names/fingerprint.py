"""The fingerprint: BLAKE3 of one line per tensor, sorted by the UTF-8 bytes of its canonical name."""

from __future__ import annotations

import json
from collections.abc import Mapping

from blake3 import blake3


def tensor_line(name: str, dtype: str, shape: tuple[int, ...], digest: str) -> bytes:
    """`["name","float32",[64,3,7,7],"<hex>"]` and a line feed."""
    row = [name, dtype, list(shape), digest]
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def fingerprint(lines: Mapping[str, bytes]) -> str:
    """`blake3:` and 64 hex digits, of the lines by canonical name."""
    digest = blake3()
    for _, line in sorted((name.encode("utf-8", "surrogatepass"), line) for name, line in lines.items()):
        digest.update(line)
    return "blake3:" + digest.hexdigest()
