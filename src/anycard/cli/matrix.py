"""`anycard matrix`: every way of saving x every way of loading, run and verified here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from anycard.progress import on_terminal

if TYPE_CHECKING:
    from anycard.matrix import MatrixReport

DEFAULT_MODEL = "torchvision.models:resnet152"


@click.command("matrix", short_help="Every way of saving x every way of loading, run here.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as data.")
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Write the table as a picture.")
def command(model: str, as_json: bool, svg: str | None) -> None:
    """Save MODEL in every way, load each file in every way, compare every tensor bit for bit.

    MODEL is package.module:factory. Each cell also shows what the usual lines in plain PyTorch give.
    The weights are random. Exit status 1 if anycard was not exact in a cell.
    """
    from anycard.matrix import ModelError, run_matrix

    try:
        with _bar() as progress:
            report = run_matrix(model, progress=progress)
    except ModelError as error:
        raise _refusal(str(error)) from None
    _show(report, as_json)
    if svg is not None:
        _write_svg(report, svg)
    if not report.ok:
        raise click.exceptions.Exit(1)


def _show(report: MatrixReport, as_json: bool) -> None:
    from anycard.matrix import tables

    if as_json:
        click.echo(json.dumps(tables.as_data(report), indent=2))
    elif not (on_terminal(sys.stdout) and _show_table(report)):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        for line in tables.plain_lines(report):
            click.echo(line.encode(encoding, "backslashreplace").decode(encoding))


def _show_table(report: MatrixReport) -> bool:
    """False where the terminal is too narrow for it."""
    from rich.console import Console

    from anycard.matrix import tables

    console = Console(highlight=False)
    table = tables.fitting(report, console.width)
    if table is not None:
        console.print(table)
    return table is not None


def _write_svg(report: MatrixReport, path: str) -> None:
    from anycard.matrix.tables import as_svg

    try:
        Path(path).write_text(as_svg(report), encoding="utf-8")
    except OSError as error:
        raise _refusal(f"cannot write {path}: {error.strerror}") from None


class _RefusalError(click.ClickException):
    exit_code = 2


def _refusal(message: str) -> _RefusalError:
    from anycard.matrix.tables import printable

    return _RefusalError(printable(message))


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr, on a terminal only; it leaves nothing behind."""
    if not on_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting three processes", total=None)

        def show(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label)

        yield show
