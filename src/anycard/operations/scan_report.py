"""What `scan` found."""

from __future__ import annotations

from dataclasses import dataclass, field

from anycard.pickles.judging import CLEAN


@dataclass(frozen=True)
class Finding:
    """A global that a pickle names.

    Attributes:
        name: `module.name`.
        kind: "torch's own tensor format", "inert data", "unknown" or "runs code".
        called: It is called, not only referred to.
        where: The pickle: a record's name, and what it lies in.
        offset: Byte offset within that pickle's data.
    """

    name: str
    kind: str
    called: bool
    where: str
    offset: int


@dataclass
class ScanReport:
    """What `scan` found.

    Attributes:
        path: The file or folder.
        pickles: How many pickles were followed.
        findings: Every global, worst first.
        unreadable: What could not be followed to its end, and why.
    """

    path: str
    pickles: int = 0
    findings: list[Finding] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing but torch's own tensor format and inert data would be touched, and all of it was followed."""
        return not self.unreadable and not self.bad

    @property
    def bad(self) -> list[Finding]:
        """What is unknown or runs code."""
        return [finding for finding in self.findings if finding.kind not in CLEAN]
