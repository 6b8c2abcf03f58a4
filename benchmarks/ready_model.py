"""From a path to a ready resnet152: anycard against the usual recipe, side by side in one run.

Page cache warm, medians of interleaved rounds; only the ratios carry over to another machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

warnings.filterwarnings("ignore", message=".*image Python extension.*")

from torchvision.models import resnet152  # noqa: E402

import anycard  # noqa: E402


def usual_recipe(path: Path) -> torch.nn.Module:
    """Build, read, copy: what every tutorial does."""
    model = resnet152()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def measured(ways: dict[str, Callable[[], torch.nn.Module]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(held) for name, held in times.items()}


def main() -> None:
    """Print a table: seconds, and how many times faster than the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        source = resnet152()
        pth, safe = Path(folder, "resnet152.pth"), Path(folder, "resnet152.safetensors")
        anycard.save(source, pth)
        anycard.save(source, safe)
        ways = {
            "usual recipe: resnet152(), torch.load, load_state_dict": lambda: usual_recipe(pth),
            "anycard.load(.pth, resnet152)": lambda: anycard.load(pth, resnet152),
            "anycard.load(.safetensors, resnet152)": lambda: anycard.load(safe, resnet152),
        }
        times = measured(ways, rounds)
        got, want = anycard.load(pth, resnet152).state_dict(), source.state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    recipe = times[next(iter(ways))]
    print(f"resnet152, 932 tensors, 0.24 GB, warm, {rounds} rounds, torch {torch.__version__}")
    for name, seconds in times.items():
        print(f"{name:<58}{seconds * 1000:>8.0f} ms{recipe / seconds:>7.1f} x")


if __name__ == "__main__":
    main()
