"""Every contestant in a fresh process, by rounds; the subjects' files come and go as they are needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from random import Random

from environments import ROOT, environment, install
from speed.contests import TINY, WARM_UP, Contest, Contestant, Profile
from speed.processes import Worker, WorkerError
from speed.results import Outcome
from speed.subjects import Model, Subject

_PEERS = Path(__file__).with_name("peers.txt")
# Their own pins would pull another torch; where the matching one cannot be imported beside this torch, 0.16.2 can.
_BASE = ("torch", "numpy", "blake3", "zlib-ng", "pillow", "requests")  # the last two are torchvision's
_TORCHVISION = ("torchvision==0.28.0", "torchvision==0.16.2")


@dataclass
class Peers:
    """The environment of the other libraries.

    Attributes:
        python: Its interpreter; None: there is none.
        missing: Library -> why it is not there.
        reason: Why there is no environment.
    """

    python: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)
    reason: str = "the peers were left out"

    def why_not(self, library: str) -> str:
        """Why a library cannot be run; empty if it can."""
        return self.reason if self.python is None else self.missing.get(library, "")


def install_peers(folder: Path) -> Peers:
    """Make the environment, or say why not; one that is as wanted already is left as it is."""
    wanted = [line for line in _PEERS.read_text().splitlines() if line and not line.startswith("#")]
    held = "\n".join((*_BASE, *_TORCHVISION, *wanted))
    mark = folder / "peers" / "installed.txt"
    python = folder / "peers" / "bin" / "python"
    if mark.exists() and mark.read_text() == held:
        return Peers(python)
    try:
        python = environment(folder, "peers", list(_BASE))
        _install_torchvision(python)
    except (OSError, subprocess.CalledProcessError) as error:
        return Peers(reason=_said(error))
    missing = {}
    for requirement in wanted:
        try:
            install(python, ["-c", str(ROOT / "constraints.txt"), requirement])
        except subprocess.CalledProcessError as error:
            missing[requirement.partition("==")[0]] = f"pip cannot install it: {_said(error)}"
    if not missing:
        mark.write_text(held)
    return Peers(python, missing)


def _install_torchvision(python: Path) -> None:
    for version in _TORCHVISION:
        install(python, ["--no-deps", version])
        if subprocess.run([python, "-W", "ignore", "-c", "import torchvision"], capture_output=True).returncode == 0:
            return


def _said(error: Exception) -> str:
    text = getattr(error, "stderr", "") or str(error)
    return text.strip().splitlines()[-1][:200]


@dataclass
class Runner:
    """Runs a profile in a folder; `tell` gets a line about what is done now."""

    profile: Profile
    folder: Path
    peers: Peers
    tell: Callable[[str], None]
    gpu: bool = False

    def run(self, contests: Iterable[Contest]) -> dict[str, dict[str, Outcome]]:
        """All rounds of all contests."""
        chosen = list(contests)
        self._make({WARM_UP: TINY}, chosen)
        begun = time.monotonic()
        results: dict[str, dict[str, Outcome]] = {}
        for group in self._groups(chosen):
            self._make({name: self.profile.subjects[name] for name in _subjects(group)}, group)
            for contest in group:
                results[contest.name] = {c.label: self._outcome(contest, c) for c in contest.contestants}
            self._rounds(group, results, begun)
            for name in _subjects(group):
                shutil.rmtree(self.folder / name)
        return results

    def _groups(self, contests: list[Contest]) -> Iterator[list[Contest]]:
        """Contests whose files lie on the disk at one time."""
        if self.profile.together:
            yield contests
            return
        for _, group in groupby(contests, key=lambda contest: contest.subject):
            yield list(group)

    def _rounds(self, group: list[Contest], results: dict[str, dict[str, Outcome]], begun: float) -> None:
        """The contests of a group in turn, or the rounds of all of them in turn where they lie together."""
        spells = [group] if self.profile.together else [[contest] for contest in group]
        for spell in spells:
            for turn in range(self.profile.rounds):
                start = time.monotonic()
                for contest in spell:
                    self._round(contest, results[contest.name], turn)
                now = time.monotonic()
                if now - begun + (now - start) > self.profile.seconds:
                    break

    def _round(self, contest: Contest, outcomes: dict[str, Outcome], turn: int) -> None:
        self.tell(f"{contest.name}, round {turn + 1}")
        # Nobody is always the first, or always behind the same one: what that has read may still be near.
        turns = Random(turn).sample(contest.contestants, len(contest.contestants))
        held = [c for c in turns if not outcomes[c.label].failure]
        for at in range(0, len(held), self.profile.abreast):
            self._runs({c.label: self._started(contest, c) for c in held[at : at + self.profile.abreast]}, outcomes)

    def _runs(self, workers: Mapping[str, Worker], outcomes: Mapping[str, Outcome]) -> None:
        """All have prepared before one runs, and they run one after the other."""
        for worker in workers.values():
            worker.wait_until_prepared()
        for label, worker in workers.items():
            try:
                outcomes[label].runs.append(worker.run())
            except WorkerError as error:
                outcomes[label].failure = str(error)

    def _outcome(self, contest: Contest, contestant: Contestant) -> Outcome:
        subject = Subject.of(self.folder / (contestant.subject or contest.subject))
        path = subject.path(contestant.file)
        outcome = Outcome(contest.name, contestant.label, contestant.role)
        if contest.gpu and not self.gpu:
            outcome.failure = "no GPU here"
        elif contestant.library and (reason := self.peers.why_not(contestant.library)):
            outcome.failure = reason
        elif not path.exists():
            outcome.failure = "its file could not be made"
        else:
            outcome.nbytes = path.stat().st_size
            outcome.new_nbytes = subject.nbytes if contest.fresh else 0
        return outcome

    def _started(self, contest: Contest, contestant: Contestant) -> Worker:
        job = {
            "call": contestant.call,
            "folder": str(self.folder / (contestant.subject or contest.subject)),
            "warm_up": str(self.folder / WARM_UP),
            "file": contestant.file,
            "cache": contest.cache,
            "options": dict(contestant.options),
        }
        python = self.peers.python if contestant.library and self.peers.python else sys.executable
        return Worker(python, job)

    def _make(self, models: Mapping[str, Model], contests: Iterable[Contest]) -> None:
        """The subjects' files; tensorizer's only where a contest asks."""
        self.tell(f"writing {', '.join(models)}")
        Worker(sys.executable, {"make": {str(self.folder / name): vars(model) for name, model in models.items()}}).run()
        asking = {c.subject for c in contests if any(one.file == "tensorizer" for one in c.contestants)}
        asking |= {WARM_UP} if asking else set()
        folders = {str(self.folder / name): None for name in models if name in asking}
        if folders and self.peers.python is not None and not self.peers.why_not("tensorizer"):
            try:
                Worker(self.peers.python, {"make": folders}).run()
            except WorkerError as error:
                self.peers.missing["tensorizer"] = str(error)


def _subjects(contests: Iterable[Contest]) -> list[str]:
    """Every subject that a group of contests needs, once; the tiny one is always there."""
    names = [name for contest in contests for c in contest.contestants for name in (contest.subject, c.subject) if name]
    return [name for name in dict.fromkeys(names) if name != WARM_UP]
