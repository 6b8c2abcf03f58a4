"""A worker process: holds the model, saves it, loads into it, compares. One command, one reply."""

from __future__ import annotations

import gc
import importlib
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from anycard.matrix import rows
from anycard.matrix.bits import digest, judge, poison, refill, scramble, tensors_of
from anycard.matrix.commands import Command, Load, Save, Setup, Wrap
from anycard.matrix.recipes import RECIPES
from anycard.matrix.results import EXACT, Facts, Outcome, failed
from anycard.matrix.savers import wrapped, write

# A rank that waits for one that died must come back by itself; the pool's own patience is longer.
_GROUP_PATIENCE = timedelta(seconds=60)


def serve(connection: Connection, setup: Setup) -> None:
    """Build, report what was built (or why not), then obey until the pipe closes."""
    torch.set_num_threads(1)
    try:
        place = Workplace(setup)
    except Exception as error:  # noqa: BLE001  the model's code may raise anything
        connection.send(failed(error))
        return
    connection.send(place.facts)
    while True:
        try:
            command: Command = connection.recv()
        except EOFError:
            return
        connection.send(place.obey(command))


class Workplace:
    """The model of one process, what its tensors must be, and what was rebuilt last."""

    def __init__(self, setup: Setup) -> None:
        self.rank = setup.rank
        self.several = setup.world > 1
        self.model = _build(setup)
        self.expected = scramble(self.model)
        self.allow = sorted({name for m in self.model.modules() if _foreign(name := type(m).__module__)})
        self.rebuilt: torch.nn.Module | None = None
        self.refusal: Exception | None = None
        self.target = self._join(setup) if self.several else self.model
        nbytes = sum(tensor.nbytes for tensor in self.expected.values())
        self.facts = Facts(digest(self.expected), len(self.expected), nbytes)

    def _join(self, setup: Setup) -> torch.nn.Module:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{setup.rendezvous}",
            rank=setup.rank,
            world_size=setup.world,
            timeout=_GROUP_PATIENCE,
        )
        try:
            return DistributedDataParallel(self.model)
        except Exception as error:  # noqa: BLE001  DDP refuses some models: then its error is the cell
            self.refusal = error
            return self.model

    def obey(self, command: Command) -> Outcome:
        start = time.perf_counter()
        try:
            if self.refusal is not None:
                return failed(self.refusal)
            if isinstance(command, Save):
                return self._save(command)
            return self._load(command) if isinstance(command, Load) else self._wrap(command)
        except Exception as error:  # noqa: BLE001  any error is the cell's verdict
            return failed(error, time.perf_counter() - start)

    def _save(self, command: Save) -> Outcome:
        refill(self.model, self.expected)
        model = self.target if command.saved_from == rows.DDP else wrapped(self.model, command.saved_from)
        start = time.perf_counter()
        write(model, command, self.rank)
        return Outcome(EXACT, EXACT, time.perf_counter() - start)

    def _load(self, command: Load) -> Outcome:
        self._forget()
        poison(self.model, self.expected)
        start = time.perf_counter()
        try:
            loaded = RECIPES[command.recipe](command.path, self.target, self.allow)
        finally:
            vars(self.target).pop("state_dict", None)  # an assigned one would stay for the next cells
        seconds = time.perf_counter() - start
        self.rebuilt = None if loaded is self.target else loaded
        prefix = "module." if isinstance(loaded, DistributedDataParallel) else ""
        return judge(tensors_of(loaded), self.expected, prefix, seconds)

    def _wrap(self, _command: Wrap) -> Outcome:
        if self.rebuilt is None:
            raise RuntimeError("nothing was rebuilt")
        model = self.rebuilt
        if not isinstance(model, DistributedDataParallel):
            model = DistributedDataParallel(model)
        outcome = judge(tensors_of(model), self.expected, "module.", 0.0)
        del model
        self._forget()
        return outcome

    def _forget(self) -> None:
        """Let go of the last rebuilt model: wrappers sit in reference cycles."""
        if self.rebuilt is not None:
            self.rebuilt = None
            gc.collect()
            gc.freeze()  # what is left stays for good: the next collection skips it (0.2 s with torch)


def _build(setup: Setup) -> torch.nn.Module:
    """The factory's model. The caller's folder comes first on the import path, for this alone."""
    module_name, _, name = setup.model.partition(":")
    sys.path.insert(0, setup.folder)
    factory = importlib.import_module(module_name)
    for part in name.split("."):
        factory = getattr(factory, part)
    torch.manual_seed(0)
    model = factory()  # type: ignore[operator]
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name}() gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _foreign(module_name: str) -> bool:
    return module_name.partition(".")[0] != "torch"
