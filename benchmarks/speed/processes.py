"""Worker processes, seen from the one that starts them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from environments import ROOT
from speed.worker import READY

_TIMEOUT = 600
_PATH = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])


class WorkerError(Exception):
    """A process that failed, and the last that it said."""


class Worker:
    """A fresh process. It prepares at once, and runs what is timed when it is told to go."""

    def __init__(self, python: str | Path, job: dict[str, Any]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when it has run
        self._process = subprocess.Popen(
            [str(python), "-m", "speed.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "PYTHONPATH": _PATH, "PYTHONWARNINGS": "ignore"},
        )
        self._timer = threading.Timer(_TIMEOUT, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def wait_until_prepared(self) -> None:
        """Returns too where the process failed: `run` says so."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and line != READY:
            pass

    def run(self) -> dict[str, Any]:
        """Let it go on, to its end.

        Raises:
            WorkerError: It failed.
        """
        output, _ = self._process.communicate("go\n")
        self._timer.cancel()
        with self._said:
            if self._process.returncode == 0:
                return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
        raise WorkerError(said[-1][:200] if said else f"no word, exit status {self._process.returncode}")
