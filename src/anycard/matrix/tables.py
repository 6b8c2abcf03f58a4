"""The report as a table, as lines and as data. Returns renderables and text; printing is the caller's."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import HORIZONTALS
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from anycard.matrix.results import NOTHING, OURS, PLAIN, Cell, MatrixReport, Outcome
from anycard.matrix.rows import COLUMNS, Row

WIDTH = 112  # what a README shows without a scroll bar
_SVG_ID = "anycard-matrix"  # rich would make one from the content's hash, and so would each new version of it
_SEVERAL = "several: two gloo processes with DistributedDataParallel; a whole model is wrapped once loaded"
_SEATS = tuple((column, loader) for column in COLUMNS for loader in (PLAIN, OURS))


@dataclass(frozen=True)
class Line:
    """One line of the table: rows that differ in nothing but their suffix."""

    row: Row
    suffixes: tuple[str, ...]
    outcomes: tuple[Outcome, ...]


def printable(text: str) -> str:
    """Text with its control characters spelt out: model names and errors come from anywhere."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def grouped(report: MatrixReport) -> list[Line]:
    """Rows with the same verdicts as one line, in the order of the rows."""
    lines: dict[tuple[str, ...], Line] = {}
    for row, outcomes in _by_row(report.cells):
        verdicts = tuple(outcome.verdict for outcome in outcomes)
        key = (row.saved_from, row.what, row.writer, *verdicts)
        old = lines.get(key)
        suffixes = (*old.suffixes, row.suffix) if old else (row.suffix,)
        lines[key] = Line(row, suffixes, outcomes)
    return list(lines.values())


def _by_row(cells: Iterable[Cell]) -> list[tuple[Row, tuple[Outcome, ...]]]:
    rows: list[tuple[Row, tuple[Outcome, ...]]] = []
    pending: list[Outcome] = []
    for cell in cells:
        pending.append(cell.outcome)
        if len(pending) == len(_SEATS):
            rows.append((cell.row, tuple(pending)))
            pending = []
    return rows


def fitting(report: MatrixReport, width: int) -> Group | None:
    """The table in words that a terminal of this width need not cut; None where it would cut the shortest."""
    for narrow in (False, True):
        table = _table(grouped(report), {}, narrow)
        if Console(width=1000).measure(table).maximum <= width:
            return render(report, narrow=narrow)
    return None


def render(report: MatrixReport, *, times: bool = True, narrow: bool = False) -> Group:
    """The table, its footnotes and the counts; without `times` the same run gives the same picture.

    Args:
        narrow: All that is not exact stands in the footnotes.
    """
    notes: dict[str, int] = {}
    table = _table(grouped(report), notes, narrow)
    footnotes = [Text(f"[{number}] {printable(verdict)}") for verdict, number in notes.items()]
    legend = [Text(f"{what:<26}{recipe}", style="dim") for recipe, what in _legend(report).items()]
    legend.append(Text(_SEVERAL, style="dim"))
    summary = [Text(line, style="bold") for line in summary_lines(report, times=times)]
    return Group(_title(report), table, *footnotes, Text(""), *legend, Text(""), *summary)


def _legend(report: MatrixReport) -> dict[str, str]:
    """Which lines loaded what: recipe to words."""
    words: dict[str, str] = {}
    for cell in report.cells:
        row = cell.row
        what = row.saved_from if row.what == "method" else row.what
        if row.suffix == ".safetensors":
            what = row.suffix
        words.setdefault(cell.recipe, what if cell.loader == PLAIN else f"{OURS}, {what}")
    return words


def _title(report: MatrixReport) -> Text:
    return Text(f"{printable(report.model)}: {_size(report)}; all compared in every cell, bit for bit")


def _size(report: MatrixReport) -> str:
    return f"{report.tensors:,} tensors, {report.nbytes / 1e6:,.1f} MB"


def _table(lines: list[Line], notes: dict[str, int], narrow: bool) -> Table:
    padding = 0 if narrow else (0, 1)
    table = Table(box=HORIZONTALS, collapse_padding=True, pad_edge=False, show_edge=not narrow, padding=padding)
    for title, width in (("saved from", 12), ("what", 14), ("written by", 14), ("suffix", 14)):
        table.add_column(f"\n{title}", max_width=width if narrow else 14)
    for column, loader in _SEATS:
        over, title = (f"{column}:", loader.removesuffix(" PyTorch")) if narrow else (f"on {column}:", loader)
        table.add_column(f"{over}\n{title}" if loader == PLAIN else f"\n{title}", max_width=16)
    for place, line in enumerate(lines):
        last = place + 1 == len(lines) or lines[place + 1].row.saved_from != line.row.saved_from
        first = place == 0 or lines[place - 1].row.saved_from != line.row.saved_from
        cells = [_cell(outcome, notes, narrow) for outcome in line.outcomes]
        name = line.row.saved_from if first else ""
        table.add_row(name, line.row.what, line.row.writer, _suffixes(line), *cells, end_section=last)
    return table


def _suffixes(line: Line) -> str:
    """The three suffixes of torch on one line, .safetensors on the next."""
    short = [suffix for suffix in line.suffixes if suffix != ".safetensors"]
    both = [" ".join(short), *(suffix for suffix in line.suffixes if suffix == ".safetensors")]
    return "\n".join(part for part in both if part)


def _cell(outcome: Outcome, notes: dict[str, int], narrow: bool) -> Text:
    if outcome.exact:
        return Text(outcome.verdict, style="green")
    words = "no" if narrow else printable(outcome.short)
    if narrow or outcome.short != outcome.verdict:
        number = notes.setdefault(outcome.verdict, len(notes) + 1)
        words = f"{words} [{number}]"
    return Text(words, style="bold red" if outcome.verdict == NOTHING else "red")


def summary_lines(report: MatrixReport, *, times: bool = True) -> list[str]:
    """Counts and times, anycard first."""
    lines = []
    for loader in (OURS, PLAIN):
        exact, cells, seconds = report.count(loader)
        took = f", {seconds:.1f} s of loading" if times else ""
        lines.append(f"{loader}: {exact} of {cells} cells exact{took}")
    if times:
        saves = [seconds for _, seconds in report.save_seconds]
        lines.append(f"{len(saves)} files saved in {sum(saves):.1f} s, {report.seconds:.1f} s in all")
    if report.note:
        lines.append(report.note)
    return lines


def plain_lines(report: MatrixReport) -> list[str]:
    """For a pipe: a line a cell, the verdict last, then the counts."""
    lines = [f"{printable(report.model)}: {_size(report)}"]
    for cell in report.cells:
        where = f"{cell.row.label}, on {cell.column} with {cell.recipe}"
        lines.append(f"{cell.loader}: {where}: {printable(cell.outcome.verdict)}")
    return lines + summary_lines(report)


def as_data(report: MatrixReport) -> dict[str, object]:
    """For programs: plain data, rows with their cells."""
    saves = [seconds for _, seconds in report.save_seconds]
    cells = [report.cells[at : at + len(_SEATS)] for at in range(0, len(report.cells), len(_SEATS))]
    return {
        "model": report.model,
        "tensors": report.tensors,
        "nbytes": report.nbytes,
        "ok": report.ok,
        "seconds": report.seconds,
        "note": report.note,
        "counts": {loader: _count(report, loader) for loader in (OURS, PLAIN)},
        "rows": [_row_data(four, seconds) for four, seconds in zip(cells, saves, strict=True)],
    }


def _count(report: MatrixReport, loader: str) -> dict[str, object]:
    exact, cells, seconds = report.count(loader)
    return {"exact": exact, "cells": cells, "seconds": seconds}


def _row_data(cells: tuple[Cell, ...], save_seconds: float) -> dict[str, object]:
    row = cells[0].row
    return {
        "saved_from": row.saved_from,
        "what": row.what,
        "writer": row.writer,
        "suffix": row.suffix,
        "save_seconds": save_seconds,
        "cells": [
            {
                "column": cell.column,
                "loader": cell.loader,
                "recipe": cell.recipe,
                "verdict": cell.outcome.verdict,
                "exact": cell.exact,
                "seconds": cell.outcome.seconds,
            }
            for cell in cells
        ],
    }


def as_svg(report: MatrixReport) -> str:
    """The table as a picture, without times: the same verdicts give the same bytes."""
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        no_color=False,
        highlight=False,
    )
    console.print(render(report, times=False))
    return console.export_svg(title=f"anycard matrix {printable(report.model)}", unique_id=_SVG_ID)
