"""The loop: save a row's file, load it four times, delete it, go on."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from anycard.matrix import rows as rows_
from anycard.matrix.commands import Load, Save, Wrap
from anycard.matrix.pool import Team
from anycard.matrix.results import OURS, PLAIN, Cell, Facts, MatrixReport, Outcome
from anycard.matrix.rows import COLUMNS, REBUILD, WHOLE, Row
from anycard.needs_torch import needs_torch, torch_is_there

Progress = Callable[[int, int, str], None]  # rows done, rows in all, what runs now
_PROCESSES = {"single": 1, "several": 2}


class ModelError(ValueError):
    """MODEL cannot be imported or built."""


def run_matrix(spec: str, *, rows: Sequence[Row] | None = None, progress: Progress | None = None) -> MatrixReport:
    """Run every row on every column, by plain PyTorch and by anycard, comparing every tensor's bits.

    Args:
        spec: `package.module:factory`; the factory is called without arguments, in each worker.
            The current folder is on its import path.
        rows: What to run; all that this installation can run unless given.
        progress: Called with `(rows done, rows in all, label)`.

    Returns:
        The cells with their verdicts and times. Errors inside a cell are its verdict.

    Raises:
        ModelError: The model cannot be imported, built, or comes out different in each process.

    Uses a temporary folder (`TMPDIR`), one checkpoint at a time, and three worker processes.
    """
    _check_spec(spec)
    if not torch_is_there():
        raise needs_torch("the matrix")
    start = time.perf_counter()
    chosen, note = rows_.runnable(tuple(rows) if rows is not None else rows_.all_rows())
    with _teams(spec) as (scratch, teams, facts):
        cells: list[Cell] = []
        saves: list[tuple[Row, float]] = []
        for done, row in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen), row.label)
            saved, row_cells = _run_row(row, scratch / "row", teams)
            saves.append((row, saved.seconds))
            cells.extend(row_cells)
        if progress is not None:
            progress(len(chosen), len(chosen), "done")
    seconds = time.perf_counter() - start
    return MatrixReport(spec, facts.tensors, facts.nbytes, tuple(cells), tuple(saves), seconds, note)


def _check_spec(spec: str) -> None:
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ModelError(f"{spec} is not of the form package.module:factory")


@contextmanager
def _teams(spec: str) -> Iterator[tuple[Path, dict[str, Team], Facts]]:
    with tempfile.TemporaryDirectory(prefix="anycard-matrix-") as folder:
        scratch = Path(folder)
        teams = {column: Team(spec, _PROCESSES[column], scratch) for column in COLUMNS}
        try:
            yield scratch, teams, _start(spec, teams)
        finally:
            for team in teams.values():
                team.stop()


def _start(spec: str, teams: dict[str, Team]) -> Facts:
    try:
        for team in teams.values():
            team.launch()
        facts = [fact for team in teams.values() for fact in team.facts()]
    except RuntimeError as error:
        raise ModelError(f"cannot build {spec}: {error}") from None
    if len({fact.digest for fact in facts}) > 1:
        raise ModelError(f"{spec} builds another model in each process")
    return facts[0]


def _run_row(row: Row, folder: Path, teams: dict[str, Team]) -> tuple[Outcome, list[Cell]]:
    """Save, load in each column by each side, delete."""
    folder.mkdir()
    path = str(folder / f"model{row.suffix}")
    try:
        saver = teams["several" if row.saved_from == rows_.DDP else "single"]
        saved = saver.ask(Save(path, row.saved_from, row.what, row.writer))
        cells = []
        for column in COLUMNS:
            for loader, recipe in ((PLAIN, row.plain), (OURS, row.ours)):
                outcome = _load(teams[column], path, recipe) if saved.exact else _unsaved(saved)
                cells.append(Cell(row, column, loader, outcome))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return saved, cells


def _load(team: Team, path: str, recipe: str) -> Outcome:
    """Load and compare; on several, a rebuilt model is then wrapped, and compared again.

    Two steps, because wrapping is collective: a rank whose load failed must not leave the other waiting.
    """
    outcome = team.ask(Load(path, recipe))
    if team.world == 1 or recipe not in (WHOLE, REBUILD) or outcome.error:
        return outcome
    return replace(team.ask(Wrap()), seconds=outcome.seconds)


def _unsaved(saved: Outcome) -> Outcome:
    return Outcome(f"not saved: {saved.verdict}", "not saved", error=True)
