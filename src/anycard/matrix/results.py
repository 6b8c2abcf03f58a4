"""What came out: a cell is one file loaded on one column by one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anycard.matrix.rows import Row

EXACT = "exact"
NOTHING = "loaded nothing, silently"
PLAIN, OURS = "plain PyTorch", "anycard"


@dataclass(frozen=True)
class Outcome:
    """A verdict in words, its short form for a table, and what the load took."""

    verdict: str
    short: str = ""
    seconds: float = 0.0
    error: bool = False

    @property
    def exact(self) -> bool:
        return self.verdict == EXACT


@dataclass(frozen=True)
class Cell:
    row: Row
    column: str
    loader: str  # PLAIN or OURS
    outcome: Outcome

    @property
    def exact(self) -> bool:
        return self.outcome.exact

    @property
    def recipe(self) -> str:
        return self.row.plain if self.loader == PLAIN else self.row.ours


@dataclass(frozen=True)
class Facts:
    """What a worker says about the model that it built."""

    digest: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class MatrixReport:
    """All cells, in the order of the rows; what anycard is judged by is `ok`."""

    model: str
    tensors: int
    nbytes: int
    cells: tuple[Cell, ...]
    save_seconds: tuple[tuple[Row, float], ...]
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return all(cell.exact for cell in self.cells if cell.loader == OURS)

    def count(self, loader: str) -> tuple[int, int, float]:
        """Exact cells, all cells, seconds spent loading."""
        mine = [cell for cell in self.cells if cell.loader == loader]
        return sum(cell.exact for cell in mine), len(mine), sum(cell.outcome.seconds for cell in mine)


def failed(error: BaseException, seconds: float = 0.0) -> Outcome:
    """An error as a verdict: its class and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return Outcome(f"{name}: {lines[0]}" if lines else name, name, seconds, error=True)


def merged(outcomes: Sequence[Outcome]) -> Outcome:
    """Several ranks' outcomes as one: an error before a wrong result before exact, as slow as the slowest."""
    worst = min(outcomes, key=lambda outcome: (not outcome.error, outcome.exact))
    return replace(worst, seconds=max(outcome.seconds for outcome in outcomes))
