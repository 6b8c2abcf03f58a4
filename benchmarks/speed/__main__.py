"""How fast anycard moves checkpoints, beside what people use today and bare loops, side by side in one run.

    cd benchmarks; python -m speed [full | quick] [--only WORDS] [--rounds N] [--docs FOLDER] [--no-peers]

With --docs, contests that the files there hold from earlier and that are not held now stay as they are, so that
a full run may be held in parts: a table is one run, and says of which day.

Linux only: the page cache is asked by mincore(2), memory and calls by /proc. Files go to the temporary folder
($TMPDIR), up to 11 GB at a time for the full run, and are deleted again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from environments import ROOT
from speed.contests import PROFILES
from speed.machine import has_gpu, machine
from speed.plot import as_svg
from speed.report import as_data, render
from speed.results import Outcome, Results
from speed.running import Peers, Runner, install_peers

_WIDTH = 124


def main() -> int:
    """Run, print, and write what was asked for."""
    arguments = _arguments()
    profile = PROFILES[arguments.profile]
    profile = replace(profile, rounds=arguments.rounds or profile.rounds)
    contests = [contest for contest in profile.contests if all(word in contest.name for word in arguments.only)]
    if not contests:
        names = "\n  ".join(contest.name for contest in profile.contests)
        sys.exit(f"no contest's name holds {' and '.join(arguments.only)}; there are\n  {names}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes then too
    said = Console(stderr=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anycard-bench-") as folder:
        facts = machine(Path(folder))
        with said.status("") as status:

            def tell(words: str) -> None:
                status.update(Text(f"{time.monotonic() - begun:4.0f} s  {words}"))

            tell("the environment of the others")
            peers = Peers() if arguments.no_peers else install_peers(ROOT / ".bench")
            tell("looking for a GPU")
            gpu = any(contest.gpu for contest in contests) and has_gpu()
            results = Runner(profile, Path(folder), peers, tell, gpu).run(contests)
    days = dict.fromkeys(results, time.strftime("%Y-%m-%d", time.gmtime()))
    if arguments.docs is not None:
        results, days = _with_earlier(arguments.docs / "bench.json", results, days)
    contests = [contest for contest in profile.contests if contest.name in results]
    title = f"anycard's benchmarks, {profile.name}; each table is one run"
    shown = render(results, contests, facts, title, days)
    Console(width=_WIDTH).print(shown)
    if arguments.docs is not None:
        data = as_data(results, contests, facts, title, days)
        _write(arguments.docs / "bench.json", json.dumps(data, separators=(",", ":")) + "\n")
        _write(arguments.docs / "bench.svg", as_svg(results, contests, title))
        with (arguments.docs / "bench.txt").open("w", encoding="utf-8") as file:
            Console(width=_WIDTH, file=file).print(shown)
    return 0


def _with_earlier(path: Path, results: Results, days: dict[str, str]) -> tuple[Results, dict[str, str]]:
    """The contests that were held before and not now, beside those of now: a full run may be held in parts."""
    if not path.exists():
        return results, days
    held = json.loads(path.read_text(encoding="utf-8"))["contests"]
    earlier = [contest for contest in held if contest["name"] not in results]
    old = {c["name"]: {one["label"]: Outcome.of(c["name"], one) for one in c["contestants"]} for c in earlier}
    return {**old, **results}, {**{c["name"]: c["day"] for c in earlier}, **days}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m speed", description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", choices=PROFILES, default="full")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="contests whose names hold it")
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of the profile's")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="write bench.json, bench.svg and bench.txt there")
    parser.add_argument("--no-peers", action="store_true", help="without other libraries: nothing is installed")
    return parser.parse_args()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
