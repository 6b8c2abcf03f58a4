"""The command line: one file a verb, loaded when asked for."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import click

from anycard.cli.streams import prepare_streams
from anycard.errors import CheckpointError
from anycard.version import __version__

VERBS = ("show", "check", "convert", "diff", "fingerprint", "verify", "scan", "matrix")


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        found: click.Command = importlib.import_module(f"anycard.cli.{name}").command
        return found


@click.command(cls=_Verbs)
@click.version_option(__version__, prog_name="anycard")
def cli() -> None:
    """Save a PyTorch model from any cards, load it on any others."""


def run() -> None:
    """The console script: exit 0 fine, 1 the answer is no, 2 cannot be read or bad usage."""
    prepare_streams()
    try:
        cli()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        fail(error)
    except FileNotFoundError as error:
        fail(f"{error.filename}: there is no such file")
    except (CheckpointError, OSError, ValueError, TypeError) as error:
        fail(error)


def fail(error: Any) -> None:
    """Say what went wrong, and exit with 2."""
    from anycard.cli.output import clean

    text = re.sub(r"\b(key|member)=('[^']*'|\"[^\"]*\")", r"--\1 \2", str(error))  # as the command line spells it
    click.echo(f"anycard: {clean(text)}", err=True)
    sys.exit(2)
