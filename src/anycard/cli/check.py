"""check: what a load would do."""

from __future__ import annotations

import importlib
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from anycard.cli.options import AS_JSON, KEY, MEMBER
from anycard.cli.output import clean, print_json


@click.command("check")
@click.argument("file")
@click.argument("model")
@KEY
@MEMBER
@AS_JSON
def command(file: str, model: str, key: str | None, member: str | None, as_json: bool) -> None:
    """What loading FILE into MODEL (package.module:factory) would do. Exit 1 where it does not fit."""
    import anycard

    plan = anycard.plan(file, factory(model), key=key, member=member)
    if as_json:
        print_json({**asdict(plan), "fits": plan.fits})
    else:
        click.echo(clean(str(plan)))
    sys.exit(0 if plan.fits else 1)


def factory(spec: str) -> Any:
    """The callable that `package.module:factory` names; the current folder is on the path."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise click.UsageError(f"{spec!r}: MODEL is package.module:factory")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with redirect_stdout(sys.stderr):  # what the module's own code prints is no part of the answer
            made = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it may raise anything
        raise click.UsageError(f"{spec}: {type(error).__name__}: {error}") from None
    return lambda: _called(made, spec)


def _called(made: Any, spec: str) -> Any:
    try:
        with redirect_stdout(sys.stderr):
            return made()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - so may the factory
        raise click.UsageError(f"{spec}() raised {type(error).__name__}: {error}") from None
