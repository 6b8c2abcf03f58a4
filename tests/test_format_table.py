"""docs/formats: its table is what the command says, and each of its formats has a page."""

from __future__ import annotations

import pytest

from format_table import GOOD, PAGE, ROWS, Row, as_markdown, tried


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")
def test_every_verb_works(row: Row) -> None:
    cells = tried(row)
    assert {verb: said for verb, said in cells.items() if said not in GOOD} == {}
    line = f"| [{row.name}]({row.page}.md) | " + " | ".join(said.replace("yes", "✓") for said in cells.values()) + " |"
    assert line in PAGE.read_text().splitlines(), "run `make formats`"


def test_every_format_has_its_page() -> None:
    assert {row.page for row in ROWS} <= {path.stem for path in PAGE.parent.glob("*.md")}


def test_the_table_shows_what_fails() -> None:
    cells = {row.name: {"list": "yes", "read": "KeyError: 'x'"} for row in ROWS}
    assert "| ✓ | (1) |" in as_markdown(cells) and "(1) KeyError: 'x'" in as_markdown(cells)
