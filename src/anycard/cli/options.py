"""Options that several verbs share."""

from __future__ import annotations

import click

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print data for programs.")
KEY = click.option("--key", help="Which state dict in the file.")
MEMBER = click.option("--member", help="Which file, where FILE holds checkpoints inside.")
