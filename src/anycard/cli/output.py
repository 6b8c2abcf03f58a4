"""What people and programs see: aligned plain text, JSON, nothing raw."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import click

# C0 and C1 controls, and what turns the direction of text; a line feed and a tab stay in what has several lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str, *, line: bool = False) -> str:
    """Control characters made visible; with `line`, line feeds and tabs too."""
    if line:
        text = text.replace("\n", "\\n").replace("\t", "\\t")
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print rows in columns; names are never cut."""
    if not rows:
        return
    shown = [[clean(cell, line=True) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        click.echo("  ".join(cells).rstrip())


def summed_up(paths: Sequence[str], most: int = 20) -> str:
    """Paths by their first part, with counts: `optimizer (67), epoch`."""
    counts: dict[str, int] = {}
    for path in paths:
        first = path.partition(".")[0]
        counts[first] = counts.get(first, 0) + 1
    shown = [f"{name} ({count:,})" if count > 1 else name for name, count in counts.items()]
    more = f" … and {len(shown) - most:,} more" if len(shown) > most else ""
    return clean(", ".join(shown[:most]) + more, line=True)


def print_json(value: Any) -> None:
    """Print data for programs; what JSON lacks (NaN, bytes, complex numbers) becomes text."""
    click.echo(json.dumps(_jsonable(value), indent=1, default=str, ensure_ascii=True, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(held) for held in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def size(nbytes: int) -> str:
    """Bytes for people, three digits: `241 MB`."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= power:
            return f"{nbytes / power:.3g} {unit}" if nbytes < 1000 * power else f"{nbytes / power:,.0f} {unit}"
    return f"{nbytes} B"


def count(number: int, what: str) -> str:
    """`1 tensor`, `932 tensors`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
