"""What the figures are held against: one table, and how its ratios are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from speed.contests import FLOOR, OURS, PEER
from speed.results import MIB, Outcome, Results

_COUNTED_FROM = 8 * MIB  # below that, /proc and late imports are what is counted
_KINDS = ("pth", "safetensors")
_LOADS = ("path to ready model", "into a model", "10,000 tensors", "deep models")


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        contest: Its name; for the counters ("extra MiB", "bytes read"), how the names of all meant begin.
        measure: A key of `MEASURES`.
        against: A label, or a role: then the fastest of that role.
        bound: The least or the most that the measure says, as it has it.
    """

    contest: str | tuple[str, ...]
    measure: str
    bound: float
    ours: str = "anycard"
    against: str = ""


@dataclass(frozen=True)
class Measure:
    """How a figure is taken from ours and another's outcome, and which way is better."""

    words: str
    take: Callable[[Outcome, Outcome], float]
    at_least: bool = False


@dataclass(frozen=True)
class Judged:
    """A goal with what was measured; None: it was not."""

    goal: Goal
    what: str
    value: float | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached."""
        if self.value is None:
            return None
        return self.value >= self.goal.bound if MEASURES[self.goal.measure].at_least else self.value <= self.goal.bound


MEASURES = {
    "times faster": Measure("{ours} against {against}", lambda a, b: b.median / a.median, at_least=True),
    "of the time": Measure("{ours} against {against}", lambda a, b: a.median / b.median),
    "of the rate": Measure("{ours} against {against}", lambda a, b: b.median / a.median, at_least=True),
    "µs a tensor": Measure("{ours}, each of 9,990 beyond 10", lambda a, b: (a.median - b.median) / 9990 * 1e6),
    "ms beyond": Measure("{ours} beyond {against}", lambda a, b: (a.median - b.median) * 1e3),
    "seconds": Measure("{ours}, whole process", lambda a, _: a.median),
    "peak MiB": Measure("{ours}, whole process", lambda a, _: a.peak / MIB),
    "extra MiB": Measure("memory beside the model, the worst of anycard's", lambda a, _: a.extra / MIB),
    "bytes read": Measure("bytes read over bytes of the file, the worst of anycard's", lambda a, _: a.reads),
}
COUNTERS = ("extra MiB", "bytes read")

GOALS: tuple[Goal, ...] = (
    *(
        Goal(f"path to ready model, {subject}", "times faster", bound, f"anycard .{kind}{mmap}", "usual recipe")
        for subject, mmap, bound in (
            ("resnet152", "", 6), ("large fp32", "", 10), ("large bf16", "", 10),
            ("large fp32", " mmap", 20), ("large bf16", " mmap", 20),
        )
        for kind in _KINDS
    ),
    *(
        Goal(f"path to ready model, {subject}", "of the time", 0.75, f"anycard .{kind}", FLOOR)
        for subject in ("resnet152", "large fp32", "large bf16")
        for kind in _KINDS
    ),
    Goal("into a model, resnet152 .pth, warm", "of the time", 1.5, against=FLOOR),
    Goal("into a model, resnet152 .safetensors, warm", "of the time", 1.25, against=FLOOR),
    *(
        Goal(f"into a model, large {dtype} .{kind}, {cache}", "of the time", 1.15, against=FLOOR)
        for dtype in ("fp32", "bf16")
        for kind in _KINDS
        for cache in ("warm", "cold")
    ),
    Goal("into a model, resnet152 .pth, warm", "times faster", 3, against=PEER),
    Goal("into a model, resnet152 .safetensors, warm", "times faster", 1.5, against=PEER),
    *(
        Goal(f"into a model, large {dtype} .{kind}, {cache}", "times faster", bound, against=PEER)
        for dtype in ("fp32", "bf16")
        for kind in _KINDS
        for cache, bound in (("warm", 4), ("cold", 1))
    ),
    *(
        Goal("10,000 tensors of 1 KB into a model", measure, bound, f"anycard .{kind}", against)
        for kind, measure, bound, against in (
            ("pth", "times faster", 8, "torch.load + copy_ by name"),
            ("safetensors", "times faster", 3, "safetensors load_file + copy_"),
            ("pth", "µs a tensor", 6, "anycard .pth, 10 tensors"),
            ("safetensors", "µs a tensor", 4, "anycard .safetensors, 10 tensors"),
        )
    ),
    # Four times the modules: a tenth for noise. Quadratic growth would be 16.
    Goal("deep models: Linear(32, 32), .pth", "of the time", 4.4, "anycard, 1,000 layers", "anycard, 250 layers"),
    *(
        Goal(f"durable save, {subject} .{kind}", "of the time", bound, against=against)
        for subject, floor in (("large fp32", 0.85), ("resnet152", 1.0))
        for kind in _KINDS
        for against, bound in ((FLOOR, floor), ("torch.save", 1.0))
    ),
    Goal("convert, large fp32 .pth to .safetensors", "of the time", 1.15, against=FLOOR),
    Goal("convert, large fp32 .safetensors to .pth", "of the time", 1.15, against=FLOOR),
    Goal("verify, large fp32 .pth", "of the rate", 0.8, against=FLOOR),
    Goal("fingerprint, large fp32 .pth", "of the rate", 0.8, against=FLOOR),
    Goal("fingerprint, large fp32 .safetensors", "of the rate", 0.8, against=FLOOR),
    *(
        Goal("anycard show, large fp32", measure, bound, f"anycard show .{kind}")
        for kind in _KINDS
        for measure, bound in (("seconds", 0.10), ("peak MiB", 60))
    ),
    Goal("import anycard", "ms beyond", 50, "import anycard", FLOOR),
    *(
        Goal("to the GPU, large fp32", measure, bound, f"anycard .{kind}", against)
        for kind in _KINDS
        for measure, bound, against in (("of the rate", 0.8, FLOOR), ("times faster", 1, PEER))
    ),
    Goal((*_LOADS, "durable save"), "extra MiB", 64),
    Goal(("convert",), "extra MiB", 64),
    Goal((*_LOADS, "convert", "verify", "fingerprint"), "bytes read", 1.01),
)  # fmt: skip


def judged(results: Results) -> list[Judged]:
    """Every goal whose contestants were meant to run, in the table's order."""
    return [found for goal in GOALS if (found := _judge(goal, results)) is not None]


def _judge(goal: Goal, results: Results) -> Judged | None:
    measure = MEASURES[goal.measure]
    if goal.measure in COUNTERS:
        outcomes = [o for name, held in results.items() if name.startswith(goal.contest) for o in held.values()]
        worst = _worst([o for o in outcomes if o.role == OURS and o.runs and o.nbytes >= _COUNTED_FROM], measure)
        return Judged(goal, f"{measure.words} ({worst.where})", measure.take(worst, worst)) if worst else None
    held = results.get(str(goal.contest), {})
    there = {word for outcome in held.values() for word in (outcome.label, outcome.role)}
    if not {goal.ours, goal.against or goal.ours} <= there:
        return None  # a smaller profile
    ours, other = held.get(goal.ours), _other(held, goal.against)
    label = other.label if other is not None else goal.against
    what = measure.words.format(ours=goal.ours, against=label)
    if ours is None or not ours.runs or (goal.against and other is None):
        return Judged(goal, what, None)
    return Judged(goal, what, measure.take(ours, other or ours))


def _worst(outcomes: list[Outcome], measure: Measure) -> Outcome | None:
    return max(outcomes, key=lambda outcome: measure.take(outcome, outcome), default=None)


def _other(held: Mapping[str, Outcome], against: str) -> Outcome | None:
    """Whom the goal names, or the fastest of the role."""
    meant = [outcome for outcome in held.values() if against in (outcome.label, outcome.role) and outcome.runs]
    return min(meant, key=lambda outcome: outcome.median, default=None)
