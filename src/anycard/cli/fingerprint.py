"""fingerprint: the same hash for the same weights."""

from __future__ import annotations

import click

from anycard.cli.options import AS_JSON, KEY, MEMBER
from anycard.cli.output import print_json
from anycard.operations.fingerprinting import fingerprint


@click.command("fingerprint")
@click.argument("file")
@KEY
@MEMBER
@AS_JSON
def command(file: str, key: str | None, member: str | None, as_json: bool) -> None:
    """The hash of FILE's weights: the same in any format, any wrapper."""
    value = fingerprint(file, key=key, member=member, progress=True)
    if as_json:
        print_json({"path": file, "fingerprint": value})
    else:
        click.echo(value)
