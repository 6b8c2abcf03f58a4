"""diff: names, shapes, dtypes and values of two files."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from anycard.cli.options import AS_JSON, KEY, MEMBER
from anycard.cli.output import print_json, table
from anycard.operations.comparison import Difference, diff


@click.command("diff")
@click.argument("a")
@click.argument("b")
@KEY
@MEMBER
@AS_JSON
def command(a: str, b: str, key: str | None, member: str | None, as_json: bool) -> None:
    """Compare the weights of A and B, across formats and wrappers. Exit 1 where they differ.

    --key and --member mean both files.
    """
    found = diff(a, b, key=key, member=member)
    if as_json:
        print_json({**asdict(found), "equal": found.equal})
    else:
        verdict = "same weights" if found.equal else "different"
        click.echo(f"{verdict}: {found.same:,} tensors are the same bit for bit")
        table(_rows(found))
    sys.exit(0 if found.equal else 1)


def _rows(found: Difference) -> list[tuple[str, str, str]]:
    rows = [("only in A", name, "") for name in found.only_a] + [("only in B", name, "") for name in found.only_b]
    for name, (a, b) in found.shapes.items():
        rows.append(("shape", name, f"{_size(a)} in A, {_size(b)} in B"))
    rows += [("dtype", name, f"{a} in A, {b} in B") for name, (a, b) in found.dtypes.items()]
    return rows + [("values", name, "") for name in found.values]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
