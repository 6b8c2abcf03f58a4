"""What the matrix runs, as data: how a file was saved, and by which lines it is loaded.

The lines are the ones people know from tutorials and answers. They are keys into
`recipes.RECIPES`, so what a table prints is what has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

COLUMNS = ("single", "several")

# Plain PyTorch's textbook lines.
WEIGHTS = "model.load_state_dict(torch.load(path))"
SAFETENSORS = "model.load_state_dict(safetensors.torch.load_file(path))"
WHOLE = "model = torch.load(path, weights_only=False)"
# What people try on a file that `torch.save(model.state_dict, path)` wrote.
METHOD = "model.load_state_dict(torch.load(path, weights_only=False))"
ASSIGNED = "model.state_dict = torch.load(path, weights_only=False)"

# anycard's two.
FILL = "anycard.load(path, model)"
REBUILD = "anycard.load(path, allow=[...])"

SINGLE, DATA_PARALLEL, DDP, COMPILED = "single card", "DataParallel", "DDP", "compiled"
ABSENT_CARD, FORGOTTEN, FORGOTTEN_ASSIGNED = "absent card", "forgotten call", "forgotten call, assigned"
TORCH_SUFFIXES = (".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Row:
    """One file: how it was saved, and how each side loads it."""

    saved_from: str
    what: str  # "weights", "whole", "method"
    writer: str  # "torch", "safetensors", "anycard"
    suffix: str
    plain: str
    ours: str

    @property
    def label(self) -> str:
        return f"{self.what} from {self.saved_from}, {self.suffix} by {self.writer}"


def all_rows() -> tuple[Row, ...]:
    """Every row, in the order of the table."""
    return (*_wrapped(), *_absent(), *_forgotten())


def runnable(rows: tuple[Row, ...]) -> tuple[tuple[Row, ...], str]:
    """The rows that this installation can run, and a line on those it cannot ("" where none)."""
    if find_spec("safetensors") is not None:
        return rows, ""
    kept = tuple(row for row in rows if row.suffix != ".safetensors")
    return kept, f"{len(rows) - len(kept)} rows of .safetensors left out: safetensors is not installed"


def _wrapped() -> Iterator[Row]:
    for saved_from in (SINGLE, DATA_PARALLEL, DDP, COMPILED):
        for writer in ("torch", "anycard"):
            for suffix in TORCH_SUFFIXES:
                yield Row(saved_from, "weights", writer, suffix, WEIGHTS, FILL)
            library = "safetensors" if writer == "torch" else writer
            yield Row(saved_from, "weights", library, ".safetensors", SAFETENSORS, FILL)
        for writer in ("torch", "anycard"):
            for suffix in TORCH_SUFFIXES:
                yield Row(saved_from, "whole", writer, suffix, WHOLE, REBUILD)


def _absent() -> Iterator[Row]:
    yield Row(ABSENT_CARD, "weights", "torch", ".pt", WEIGHTS, FILL)
    yield Row(ABSENT_CARD, "whole", "torch", ".pt", WHOLE, REBUILD)


def _forgotten() -> Iterator[Row]:
    yield Row(FORGOTTEN, "method", "torch", ".pt", METHOD, FILL)
    yield Row(FORGOTTEN_ASSIGNED, "method", "torch", ".pt", ASSIGNED, FILL)
