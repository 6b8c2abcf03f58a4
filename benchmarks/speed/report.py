"""The figures as tables for people and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Group
from rich.table import Table
from rich.text import Text

from speed.contests import FLOOR, OURS, Contest
from speed.goals import COUNTERS, MEASURES, Judged, judged
from speed.results import MIB, Outcome, Results

_HOW = (
    "Every run in a fresh process that ran once on a tiny file and touched memory before the clock; its result was "
    "checked byte for byte after it. warm: mincore >= 99 % of the file right before the clock. cold: fsync, "
    "posix_fadvise DONTNEED, mincore < 1 %. written: as many bytes written, synced and freed before the clock; what "
    "anycard writes is durable, what others write where the name says so. extra: the most memory above what the "
    "process held, less a model that the run makes; of whole processes, all of it; pages of a mapped file count once "
    "touched; a copy of old values that anycard keeps in a file in memory (of many small tensors, up to 64 MiB) does "
    "not. read: bytes read by calls over bytes of the file (mapped bytes are not read by calls). calls: reading and "
    "writing system calls per MiB of the file."
)


def render(
    results: Results, contests: list[Contest], machine: Mapping[str, str], title: str, days: Mapping[str, str]
) -> Group:
    """Everything, the goals last."""
    facts = Text(", ".join(f"{key}: {value}" for key, value in machine.items()))
    parts = [part for contest in contests for part in _contest_parts(contest, results[contest.name], days)]
    return Group(Text(title, style="bold"), facts, Text(_HOW, style="dim"), *parts, _goal_table(judged(results)))


def _contest_parts(contest: Contest, outcomes: Mapping[str, Outcome], days: Mapping[str, str]) -> list[Table | Text]:
    """The table, and why somebody was not run."""
    failed = [outcome for outcome in outcomes.values() if outcome.failure]
    reasons = [Text(f"{outcome.label}: {outcome.failure}", style="red") for outcome in failed]
    return [Text(""), _contest_table(contest, outcomes, days[contest.name]), *reasons]


def _contest_table(contest: Contest, outcomes: Mapping[str, Outcome], day: str) -> Table:
    rounds = max((len(outcome.runs) for outcome in outcomes.values()), default=0)
    title = f"{contest.name} ({contest.cache}; {rounds} round{'' if rounds == 1 else 's'}; {day})"
    table = Table(title=title, title_justify="left", box=HORIZONTALS, pad_edge=False)
    table.add_column("way", min_width=36)
    for column in ("median ms", "min to max", "x floor", "extra MiB", "read", "calls/MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    floor = min((o.median for o in outcomes.values() if o.role == FLOOR and o.runs), default=0.0)
    for outcome in outcomes.values():
        table.add_row(Text(outcome.label, style="bold" if outcome.role == OURS else ""), *_cells(outcome, floor))
    return table


def _cells(outcome: Outcome, floor: float) -> list[Text | str]:
    if not outcome.runs:
        return [Text("not run", style="red")]
    spread = f"{_ms(min(outcome.seconds))} to {_ms(max(outcome.seconds))}"
    times = f"{outcome.median / floor:.2f}" if floor else ""
    counters = [f"{outcome.extra / MIB:.1f}", f"{outcome.reads:.3f}", f"{outcome.calls:.2f}"]
    return [_ms(outcome.median), spread, times, *counters]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _goal_table(goals: list[Judged]) -> Table:
    table = Table(title="goals", title_justify="left", box=HORIZONTALS, pad_edge=False)
    for column in ("contest", "what", "measured", "goal", ""):
        table.add_column(column, justify="right" if column in ("measured", "goal") else "left", overflow="fold")
    for one in goals:
        table.add_row(_contest_words(one), one.what, _measured(one), _goal_words(one), _verdict(one))
    return table


def _contest_words(one: Judged) -> str:
    return one.goal.contest if isinstance(one.goal.contest, str) else "; ".join(one.goal.contest)


def _measured(one: Judged) -> str:
    return "not run" if one.value is None else f"{one.value:,.3f}"


def _goal_words(one: Judged) -> str:
    sign = "≥" if MEASURES[one.goal.measure].at_least else "≤"
    return f"{sign} {one.goal.bound:g} {one.goal.measure}"


def _verdict(one: Judged) -> Text:
    words = {True: ("met", "green"), False: ("not met", "bold red"), None: ("", "")}
    return Text(*words[one.met])


def as_data(
    results: Results, contests: list[Contest], machine: Mapping[str, str], title: str, days: Mapping[str, str]
) -> dict[str, Any]:
    """For programs; `days`: contest -> when it was held."""
    return {
        "title": title,
        "machine": dict(machine),
        "contests": [
            {
                "name": contest.name,
                "cache": contest.cache,
                "day": days[contest.name],
                "contestants": [outcome.as_data() for outcome in results[contest.name].values()],
            }
            for contest in contests
        ],
        "goals": [
            {
                "contest": _contest_words(one),
                "what": one.what,
                "measure": one.goal.measure,
                "counter": one.goal.measure in COUNTERS,
                "measured": one.value,
                "bound": one.goal.bound,
                "met": one.met,
            }
            for one in judged(results)
        ],
    }
