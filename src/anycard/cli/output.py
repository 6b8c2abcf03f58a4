"""What people and programs see: aligned plain text, JSON, nothing raw."""

from __future__ import annotations

import json
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
    """Print data for programs."""
    click.echo(json.dumps(value, indent=1, default=str, ensure_ascii=True))
