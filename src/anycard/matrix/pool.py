"""Worker processes, seen from the calling one: started, asked, and replaced when they die or hang.

No torch here: the calling process needs none.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from anycard.matrix.commands import Command, Setup
from anycard.matrix.results import Facts, Outcome, failed, merged

START_PATIENCE_S = 300.0
COMMAND_PATIENCE_S = 120.0
SLOWEST_BYTES_PER_S = 10e6


class WorkerLostError(RuntimeError):
    """A worker process died or did not answer in time."""


class Worker:
    """One process and the pipe to it."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.log = Path(setup.log)
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_start, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, deadline: float) -> object:
        """The next reply; raises WorkerLostError where there will be none."""
        try:
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                raise WorkerLostError("the worker process did not answer in time")
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise WorkerLostError(f"the worker process died: {self._last_words()}") from None

    def _last_words(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"signal {-code}"
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        said = [line for line in lines if line.strip()]
        return said[-1].strip() if said else f"exit code {code}"

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.process.close()


class Team:
    """The processes of one column: one alone, or several in a gloo group."""

    def __init__(self, model: str, world: int, scratch: Path) -> None:
        self.model = model
        self.world = world
        self.scratch = scratch
        self.starts = 0
        self.patience = COMMAND_PATIENCE_S
        self.workers: list[Worker] = []

    def launch(self) -> None:
        """Start the processes; they import and build while the caller goes on."""
        self.starts += 1
        # A new name each time: a group that died may have left its rendezvous file behind.
        stem = self.scratch / f"group-{self.world}-{self.starts}"
        with _deaf():
            for rank in range(self.world):
                log = f"{stem}-{rank}.log"
                setup = Setup(self.model, str(Path.cwd()), rank, self.world, str(stem), log)
                self.workers.append(Worker(setup))

    def facts(self) -> list[Facts]:
        """What each process built; raises RuntimeError with the first error's text."""
        replies = self._receive(START_PATIENCE_S)
        for reply in replies:
            if isinstance(reply, Outcome):
                raise RuntimeError(reply.verdict)
        facts = [reply for reply in replies if isinstance(reply, Facts)]
        self.patience = COMMAND_PATIENCE_S + facts[0].nbytes / SLOWEST_BYTES_PER_S
        return facts

    def ask(self, command: Command) -> Outcome:
        """One command to every process, one outcome. A lost process is an outcome too."""
        try:
            if not self.workers:
                self.launch()
                self.facts()
            for worker in self.workers:
                worker.connection.send(command)
            replies = self._receive(self.patience)
        except (RuntimeError, OSError) as error:
            self.stop()
            return failed(error)
        return merged([reply for reply in replies if isinstance(reply, Outcome)])

    def _receive(self, patience: float) -> Sequence[object]:
        deadline = time.monotonic() + patience
        return [worker.receive(deadline) for worker in self.workers]

    def stop(self) -> None:
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.kill()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let processes that start now inherit an ignored Ctrl-C: no traceback of theirs on the terminal."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can be set in the main thread only
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)


def _start(connection: Connection, setup: Setup) -> None:
    """A worker's first lines: quiet, deaf to Ctrl-C (the caller ends it), without cards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a caller whose main thread did not start us
    log = os.open(setup.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ["TMPDIR"] = str(Path(setup.log).parent)  # what torch leaves there goes with the folder
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that cuda:7 is absent everywhere, and results agree

    from anycard.matrix.worker import serve

    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(connection, setup)
