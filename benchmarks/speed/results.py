"""What came of the runs, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20


@dataclass
class Outcome:
    """One contestant's runs in one contest.

    Attributes:
        runs: What `measuring.Measured` has, a dict a run.
        nbytes: Of the file.
        new_nbytes: Of a model that is made by the run: no extra memory.
        failure: Why it was not run to the end.
    """

    contest: str
    label: str
    role: str
    nbytes: int = 0
    new_nbytes: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    @property
    def where(self) -> str:
        """Contest and label."""
        return f"{self.contest}: {self.label}"

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def seconds(self) -> list[float]:
        """Of each run."""
        return [run["seconds"] for run in self.runs]

    @property
    def peak(self) -> int:
        """The most memory of any run, above what the process held before; of a process of its own, all of it."""
        return max(run["peak_nbytes"] for run in self.runs)

    @property
    def extra(self) -> int:
        """The same beside the model that the run makes."""
        return max(0, self.peak - self.new_nbytes)

    @property
    def reads(self) -> float:
        """Bytes read by calls over bytes of the file."""
        return max(run["read_nbytes"] for run in self.runs) / max(1, self.nbytes)

    @property
    def calls(self) -> float:
        """Reading and writing system calls per MiB of the file."""
        calls = statistics.median(run["read_calls"] + run["write_calls"] for run in self.runs)
        return calls * MIB / max(1, self.nbytes)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        if not self.runs:
            return {"label": self.label, "role": self.role, "failure": self.failure}
        return {
            "label": self.label,
            "role": self.role,
            "seconds": {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)},
            "extra_nbytes": self.extra,
            "bytes_read_over_file": self.reads,
            "calls_per_mib": self.calls,
            "cached": [run["cached"] for run in self.runs],
            "rounds": len(self.runs),
            "failure": self.failure,
            "nbytes": self.nbytes,
            "new_nbytes": self.new_nbytes,
            "runs": self.runs,
        }

    @classmethod
    def of(cls, contest: str, data: Mapping[str, Any]) -> Outcome:
        """What `as_data` gave."""
        kept = {name: data[name] for name in ("nbytes", "new_nbytes", "runs") if name in data}
        return cls(contest, data["label"], data["role"], failure=data["failure"], **kept)


Results = Mapping[str, Mapping[str, Outcome]]
