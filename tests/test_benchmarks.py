"""The benchmarks run, check what they measure, and say what is met; no figure is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("the benchmarks ask /proc and mincore(2)", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from speed import checks, floors, measuring  # noqa: E402
from speed.contests import FULL, PROFILES, TINY  # noqa: E402
from speed.goals import COUNTERS, GOALS, judged  # noqa: E402
from speed.results import Outcome  # noqa: E402
from speed.subjects import Subject, make  # noqa: E402


def test_a_tiny_run_prints_and_writes_its_tables(tmp_path: Path) -> None:
    """Each contestant runs in its process and is exact; the text, the data and the picture are written."""
    command = [sys.executable, "-m", "speed", "smoke", "--no-peers", "--docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)

    data = json.loads((tmp_path / "bench.json").read_text())
    assert done.stdout == (tmp_path / "bench.txt").read_text()
    runs = [one for contest in data["contests"] for one in contest["contestants"]]
    assert len(runs) == 7
    assert all(one["rounds"] == 1 and not one["failure"] for one in runs)
    assert {goal["contest"] for goal in data["goals"]} == {"import anycard"}
    assert ElementTree.parse(tmp_path / "bench.svg").getroot().tag.endswith("svg")


def test_a_result_that_is_not_exact_is_told(tmp_path: Path) -> None:
    """One bit, one name: both are seen by the check, whoever read the file."""
    make(tmp_path, TINY)
    subject = Subject.of(tmp_path)
    weights = torch.load(subject.path("pth"), weights_only=True)
    checks.same(subject, weights)

    weights["1.bias"].view(torch.uint8)[0] ^= 1
    with pytest.raises(checks.NotExactError, match=r"^1 tensors .*: 1\.bias$"):
        checks.same(subject, weights)
    del weights["1.bias"]
    with pytest.raises(checks.NotExactError, match=r"^1 tensors .*: 1\.bias$"):
        checks.same(subject, weights)


def test_bare_loops_move_every_byte(tmp_path: Path) -> None:
    """What the floors measure is the whole work: sizes that are no multiple of a chunk too."""
    data = os.urandom(2 * floors.CHUNK + 12345)
    floors.write_all(tmp_path / "file", memoryview(data))
    assert (tmp_path / "file").read_bytes() == data

    target = bytearray(len(data))
    floors.read_all(tmp_path / "file", memoryview(target))
    assert target == data
    chunks = floors.hash_all(tmp_path / "file", bytes)
    assert b"".join(bytes(chunks[at]) for at in sorted(chunks)) == data  # type: ignore[call-overload]


def test_counters_count(tmp_path: Path) -> None:
    """A file that was read is in the page cache; its bytes and the memory that they took are counted."""
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    share = measuring.prepare_cache(path, "warm")
    got, found = measuring.measured(path.read_bytes, share)
    assert share >= 0.99
    assert len(got) <= found.read_nbytes < len(got) + 65536
    assert found.read_calls >= 1
    assert len(got) * 0.9 < found.peak_nbytes < len(got) * 2


def test_goals_are_judged_by_the_fastest_of_a_role() -> None:
    """Ours takes as long as the floor: within 1.15. It is not four times as fast as the faster of the two others."""
    name = "into a model, large fp32 .pth, warm"
    seconds = {("bare", "floor"): 2.0, ("one", "peer"): 9.0, ("two", "peer"): 7.0, ("anycard", "ours"): 2.0}
    outcomes = {label: Outcome(name, label, role, runs=[_run(took)]) for (label, role), took in seconds.items()}
    found = {one.goal.measure: (one.value, one.met) for one in judged({name: outcomes}) if one.goal.contest == name}
    assert found == {"of the time": (1.0, True), "times faster": (3.5, False)}


def _run(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "peak_nbytes": 0, "read_nbytes": 0, "read_calls": 0, "write_calls": 0}


def test_each_goal_names_a_contest_and_contestants_that_are_there() -> None:
    """A goal that names nobody would never be missed."""
    there = {contest.name: {c.label for c in contest.contestants} for contest in FULL.contests}
    roles = {contest.name: {c.role for c in contest.contestants} for contest in FULL.contests}
    for goal in GOALS:
        if goal.measure in COUNTERS:
            assert any(name.startswith(goal.contest) for name in there)
            continue
        name = str(goal.contest)
        assert goal.ours in there[name], goal
        assert not goal.against or goal.against in there[name] | roles[name], goal
    for profile in PROFILES.values():
        for contest in profile.contests:
            assert len({c.label for c in contest.contestants}) == len(contest.contestants)
