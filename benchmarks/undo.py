"""What the way back costs: loads into an existing model, with the copy of its old bytes and without, by size.

`python undo.py` from this folder; the sizes of `Limits.undo_nbytes` in question, side by side in each round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import anycard
from anycard.checkpoint import open_checkpoint
from anycard.limits import DEFAULT
from anycard.torch.filling import fill
from anycard.torch.planning import make_work
from anycard.torch.undo import Undo
from anycard.torch.work import Options

_ROUNDS = 9
_MIB = (1, 4, 8, 16, 24, 30, 32, 64, 128)


def load_time(path: Path, model: nn.Module, undo_nbytes: int) -> float:
    """Seconds of one load into the model."""
    start = time.perf_counter()
    with open_checkpoint(path) as ckpt, Undo() as undo:
        work = make_work(ckpt, model, Options())
        limits = replace(DEFAULT, undo_nbytes=undo_nbytes)
        fill(work, Options(), verify=False, undo=undo, progress=None, limits=limits)
    return time.perf_counter() - start


def row(folder: Path, mib: int) -> tuple[float, float]:
    """Median milliseconds without and with the copy, for a model of that size in tensors of 256 KiB."""
    model = nn.ParameterList([nn.Parameter(torch.ones(256, 256)) for _ in range(mib * 4)])
    path = folder / f"{mib}.safetensors"
    anycard.save(model, path)
    times: dict[int, list[float]] = {0: [], 1 << 40: []}
    for _ in range(_ROUNDS):
        for bound, found in times.items():
            found.append(load_time(path, model, bound))
    without, with_copy = (statistics.median(found) * 1000 for found in times.values())
    return without, with_copy


def main() -> None:
    """Print the table."""
    table = Table(
        "model", "without", "with", "ratio", title=f"medians of {_ROUNDS} interleaved rounds, page cache warm"
    )
    with tempfile.TemporaryDirectory() as folder:
        for mib in _MIB:
            without, with_copy = row(Path(folder), mib)
            table.add_row(f"{mib} MiB", f"{without:.2f} ms", f"{with_copy:.2f} ms", f"{with_copy / without:.1f} x")
    Console().print(table)


if __name__ == "__main__":
    main()
