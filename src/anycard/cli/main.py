"""The command line: one file a verb, loaded when asked for."""

from __future__ import annotations

import importlib
import io
import re
import sys
import warnings
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
    status: object = None
    try:
        prepare_streams()
        warnings.showwarning = _warn
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        refuse(error)
    except (click.Abort, KeyboardInterrupt):
        click.echo("anycard: interrupted", err=True)
        sys.exit(130)  # as a shell calls what Ctrl-C ended
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        fail(error)
    except FileNotFoundError as error:
        fail(f"{error.filename}: there is no such file")
    except (CheckpointError, OSError, ValueError, TypeError) as error:
        fail(error)
    sys.exit(status if isinstance(status, int) else 0)


def refuse(error: click.ClickException) -> None:
    """Say how the command line is to be used, and exit with 2; what MODEL's code raised is part of some messages."""
    from anycard.cli.output import clean

    text = io.StringIO()
    error.show(text)
    click.echo(clean(text.getvalue()), err=True, nl=False)
    sys.exit(2)


def fail(error: Any) -> None:
    """Say what went wrong, and exit with 2."""
    from anycard.cli.output import clean

    click.echo(f"anycard: {clean(_as_options(str(error)))}", err=True)
    sys.exit(2)


def _as_options(text: str) -> str:
    """What Python calls `key='x'` or `key=` is spelt as the command line spells it."""
    return re.sub(r"\b(key|member)=(?:('[^']*'|\"[^\"]*\")|(?=[\s,.;:)]|$))", _as_option, text)


def _as_option(found: re.Match[str]) -> str:
    return f"--{found[1]} {found[2]}" if found[2] else f"--{found[1]}"


def _warn(
    message: Warning | str, category: object, filename: str, lineno: int, file: object = None, line: object = None
) -> None:
    """A warning is a line like an error: where in the program it arose says nothing here."""
    from anycard.cli.output import clean

    click.echo(f"anycard: {clean(_as_options(str(message)))}", err=True)
