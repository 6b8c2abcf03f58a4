"""A process for one run: prepare, make the cache warm or cold, run once, check, print JSON.

`python -m speed.worker JOB`, with `benchmarks` on the path; JOB is a JSON object, see `Job`. Once prepared it says so,
and goes on when a line comes in.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed.measuring import measured, prepare_cache, touch_disk, touch_memory
from speed.subjects import Model, Subject, make, make_tensorizer

READY = "prepared\n"


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        call: `module:function` of this package.
        folder, warm_up: Folders of the subject, and of a tiny one on which the contestant runs first, so that
            late imports and the like are not timed.
        file: Which of the subject's files.
        cache: "warm", "cold", or "written" (see `measuring.touch_disk`).
    """

    call: str
    folder: str
    warm_up: str
    file: str
    cache: str
    options: dict[str, Any] = field(default_factory=dict)


def run(job: Job) -> dict[str, Any]:
    """One run, exact or an exception."""
    module, _, name = job.call.partition(":")
    prepare = getattr(importlib.import_module(f"speed.{module}"), name)
    for folder in (job.warm_up, job.folder):
        subject = Subject.of(Path(folder))
        path = subject.path(job.file)
        act, check = prepare(subject, path, **job.options)
        if folder == job.warm_up:
            act()
    print(READY, end="", flush=True)
    sys.stdin.readline()
    touch_memory(subject.nbytes)
    gc.collect()
    if job.cache == "written":
        touch_disk(path.parent, path.stat().st_size)
    cached = prepare_cache(path, "cold" if job.cache == "cold" else "warm")
    result, found = measured(act, cached)
    check(result)
    if isinstance(result, Path):
        result.unlink()
    return found.as_data()


def _make(arguments: dict[str, Any]) -> dict[str, Any]:
    for folder, model in arguments["make"].items():
        if model is None:
            make_tensorizer(Path(folder))
        else:
            make(Path(folder), Model(**model))
    return {}


def main() -> None:
    """Read the job, print what came of it as the last line."""
    arguments = json.loads(sys.argv[1])
    found = _make(arguments) if "make" in arguments else run(Job(**arguments))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
