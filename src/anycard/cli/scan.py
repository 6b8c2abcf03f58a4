"""scan: what loading a file the ordinary way would run."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from anycard.cli.options import AS_JSON
from anycard.cli.output import clean, count, print_json, table
from anycard.operations.scan_report import ScanReport
from anycard.operations.scanning import scan


@click.command("scan", short_help="What loading it the ordinary way would run.")
@click.argument("file")
@click.option("--allow", multiple=True, metavar="NAME", help="A global (package.module.name) that you vouch for.")
@AS_JSON
def command(file: str, allow: tuple[str, ...], as_json: bool) -> None:
    """What loading FILE (or the files of a folder) the ordinary way would import and call; nothing is run.

    Exit 0 clean: nothing but tensors and inert data; 1 not clean; 2 it could not be followed to its end.
    """
    report = scan(file, allow=allow)
    if as_json:
        print_json({**asdict(report), "clean": report.clean})
    else:
        _show(report)
    sys.exit(1 if report.bad else 2 if report.unreadable else 0)


def _show(report: ScanReport) -> None:
    verdict = "clean" if report.clean else "NOT CLEAN" if report.bad else "cannot be followed to its end"
    click.echo(clean(f"{report.path}: {verdict}, {count(report.pickles, 'pickle')}", line=True))
    rows = [(f.kind, f.name, "called" if f.called else "named", f.where or "the file") for f in report.bad]
    table(rows)
    for line in report.unreadable:
        click.echo(clean(f"unreadable  {line}", line=True))
