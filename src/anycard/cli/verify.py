"""verify: every byte that carries a checksum."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from anycard.cli.options import AS_JSON
from anycard.cli.output import clean, print_json
from anycard.operations.verification import verify


@click.command("verify")
@click.argument("file")
@AS_JSON
def command(file: str, as_json: bool) -> None:
    """Check every checksum in FILE. Exit 1 where something is damaged."""
    report = verify(file)
    if as_json:
        print_json({**asdict(report), "ok": report.ok})
    else:
        unchecked = f", {len(report.unchecked):,} carry no checksum" if report.unchecked else ""
        click.echo(f"{'whole' if report.ok else 'damaged'}: {report.checked:,} tensors checked{unchecked}")
        for name in report.damaged:
            click.echo(clean(f"damaged  {name}", line=True))
    sys.exit(0 if report.ok else 1)
