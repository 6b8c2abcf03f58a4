"""verify: every byte that carries a checksum."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from anycard.cli.options import AS_JSON, MEMBER
from anycard.cli.output import clean, count, print_json
from anycard.operations.verification import Report, verify


@click.command("verify")
@click.argument("file")
@MEMBER
@AS_JSON
def command(file: str, member: str | None, as_json: bool) -> None:
    """Check every checksum in FILE. Exit 1 where something is damaged."""
    report = verify(file, member=member, progress=True)
    if as_json:
        print_json({**asdict(report), "ok": report.ok})
    else:
        click.echo(_verdict(report))
        for name in report.damaged:
            click.echo(clean(f"damaged  {name}", line=True))
    sys.exit(0 if report.ok else 1)


def _verdict(report: Report) -> str:
    unchecked = f", {count(len(report.unchecked), 'tensor')} without a checksum" if report.unchecked else ""
    if report.damaged:
        return f"damaged: {len(report.damaged):,} of {report.checked + len(report.damaged):,}{unchecked}"
    if not report.checked:
        return f"nothing to check{unchecked}"
    return f"whole: {count(report.checked, 'tensor')} checked{unchecked}"
