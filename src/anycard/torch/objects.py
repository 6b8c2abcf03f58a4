"""Load a dict of objects, the mirror of `save`: models, optimizers, schedulers and plain values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from anycard.checkpoint import Checkpoint
from anycard.errors import CheckpointError, ChoiceError, MismatchError
from anycard.progress import Progress, counting
from anycard.torch.checking import check
from anycard.torch.filling import fill
from anycard.torch.planning import make_work
from anycard.torch.reading import materialise
from anycard.torch.typed_keys import with_own_keys
from anycard.torch.undo import Undo
from anycard.torch.work import Options, Work


def load_objects(
    ckpt: Checkpoint, objects: Mapping[str, Any], options: Options, verify: bool | None, progress: Progress
) -> dict[str, Any]:
    """Fill every object; gives them and what else the file holds.

    Raises:
        ChoiceError: The file holds no dict.
        MismatchError: It lacks an object, or one does not fit. All objects are as they were.
    """
    if options.key is not None:
        raise TypeError("key= is for one model; in a dict of objects each one's name is its key")
    tree = ckpt.tree
    if not isinstance(tree, Mapping):
        raise ChoiceError(f"{ckpt.path} holds no dict of objects, as anycard.save of a dict writes", path=ckpt.path)
    absent = [name for name in objects if name not in tree]
    if absent:
        raise MismatchError(f"{ckpt.path} has no {absent}; it has {sorted(map(str, tree))}", path=ckpt.path)
    works = {name: _planned(ckpt, name, target, options) for name, target in objects.items() if _is_module(target)}
    others = {name: target for name, target in objects.items() if not _is_module(target)}
    for name, target in others.items():
        if not callable(getattr(target, "load_state_dict", None)):
            raise TypeError(f"{name} is a {type(target).__name__}, which has no load_state_dict")
    data = {str(name): materialise(value) for name, value in tree.items() if not _is_module(objects.get(name))}
    total = sum(work.plan.nbytes for work, _ in works.values())
    with Undo() as undo, counting(progress, total) as done:
        try:
            for undo.within, (work, mine) in works.items():
                fill(work, mine, verify=verify, undo=undo, done=done)
            _load_others(others, data, undo)
        except BaseException as error:
            undo.restore(error)
            raise
    return {**data, **objects}


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _planned(ckpt: Checkpoint, name: str, target: nn.Module, options: Options) -> tuple[Work, Options]:
    mine = replace(options, key=name)
    work = make_work(ckpt, target, mine)
    check(work, mine)
    return work, mine


def _load_others(objects: Mapping[str, Any], data: Mapping[str, Any], undo: Undo) -> None:
    for name, target in objects.items():
        if hasattr(target, "state_dict"):
            _remember(target, undo)
        try:
            own = target.state_dict() if hasattr(target, "state_dict") else None
            target.load_state_dict(with_own_keys(data[name], own))
        except Exception as error:
            message = f"{name} would not load its state: {error}." + ("" if undo.lost else " Nothing was changed.")
            raise CheckpointError(message, name=name) from error


def _remember(target: Any, undo: Undo) -> None:
    before = copy.deepcopy(target.state_dict())
    undo.then(lambda: target.load_state_dict(before))
