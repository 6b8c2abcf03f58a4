"""convert: between formats, under canonical names."""

from __future__ import annotations

from dataclasses import asdict

import click

from anycard.cli.options import AS_JSON, KEY, MEMBER
from anycard.cli.output import clean, count, print_json, summed_up
from anycard.operations.conversion import Conversion, convert


@click.command("convert")
@click.argument("src")
@click.argument("dst")
@KEY
@MEMBER
@AS_JSON
def command(src: str, dst: str, key: str | None, member: str | None, as_json: bool) -> None:
    """Write SRC in the format of DST's suffix, under canonical names.

    A .pt or .pth keeps all tensors and plain data; .safetensors takes one state dict.
    """
    done = convert(src, dst, key=key, member=member, progress=True)
    if as_json:
        print_json(asdict(done))
        return
    click.echo(clean(f"{done.dst}: {done.format}, {count(done.tensors, 'tensor')}"))
    _say_what_went(done)


def _say_what_went(done: Conversion) -> None:
    if done.wrappers:
        click.echo(clean(f"wrappers dropped from the names: {', '.join(done.wrappers)}"), err=True)
    if done.left_behind:
        click.echo(f"left behind: {summed_up(done.left_behind)}", err=True)
