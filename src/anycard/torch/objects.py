"""Load objects, the mirror of `save`: models, optimizers and schedulers in dicts and lists, or one alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from anycard.checkpoint import Checkpoint
from anycard.errors import CheckpointError, ChoiceError, MismatchError
from anycard.names.mappings import entries
from anycard.names.paths import join
from anycard.names.pickled_modules import class_name
from anycard.pickles.stubs import Inert
from anycard.progress import Progress, counting
from anycard.torch.checking import check
from anycard.torch.filling import fill
from anycard.torch.materialising import Materialiser, described, objects_in
from anycard.torch.planning import make_work
from anycard.torch.typed_keys import with_own_keys
from anycard.torch.undo import Undo
from anycard.torch.work import Options, Work

_Leaf = tuple[str, Any, Any]  # an object's path in the file, the object, and what the file has for it


def load_objects(ckpt: Checkpoint, objects: Any, options: Options, verify: bool | None, progress: Progress) -> Any:
    """Fill every object; gives them, in dicts and lists as the file has them, and what else these hold.

    Raises:
        ChoiceError: The file holds no dict.
        MismatchError: It lacks an object, or one does not fit. All objects are as they were.
    """
    if options.key is not None:
        raise TypeError("key= is for one model; in a dict of objects each one's name is its key")
    if isinstance(objects, Mapping) and not isinstance(ckpt.tree, Mapping):
        raise ChoiceError(f"{ckpt.path} holds no dict of objects, as anycard.save of a dict writes", path=ckpt.path)
    leaves = list(_leaves(objects, ckpt.tree, "", ckpt.path))
    works = {name: _planned(ckpt, name, target, options) for name, target, _ in leaves if isinstance(target, nn.Module)}
    others = [leaf for leaf in leaves if not isinstance(leaf[1], nn.Module)]
    for name, _, held in others:
        _refuse_pickled(name, held, ckpt.path)
    made = Materialiser()
    states = [(name, target, made.of(held)) for name, target, held in others]
    result = _merged(objects, ckpt.tree, made)
    total = sum(work.plan.nbytes for work, _ in works.values())
    with Undo() as undo, counting(progress, total) as done:
        try:
            for undo.within, (work, mine) in works.items():
                fill(work, mine, verify=verify, undo=undo, done=done)
            _load_others(states, undo)
        except BaseException as error:
            undo.restore(error)
            raise
    return result


def _loads(value: object) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "load_state_dict", None))


def _leaves(objects: Any, held: Any, name: str, path: str) -> Iterator[_Leaf]:
    """Every object, with what the file has in its place."""
    if _loads(objects):
        yield name, objects, held
        return
    if isinstance(objects, Mapping):
        there, what, wanted = isinstance(held, Mapping), "dict", list(objects.items())
    elif isinstance(objects, (list, tuple)):
        there, what, wanted = isinstance(held, (list, tuple)), "list", list(enumerate(objects))
    elif isinstance(objects, type):
        raise TypeError(
            f"{name} is the class {objects.__name__}: an object of it is needed, such as {objects.__name__}()"
        )
    else:
        raise TypeError(f"{name} is a {type(objects).__name__}, which has no load_state_dict")
    if not there:
        raise MismatchError(f"{path} has no {what} {'at ' + repr(name) if name else 'of objects'}", path=path)
    named = {key: name for key, (name, _) in zip(held, entries(held), strict=True)} if what == "dict" else {}
    have = list(named) if what == "dict" else list(range(len(held)))
    absent = [key for key, _ in wanted if key not in have]
    if absent:
        at = f" at {name!r}" if name else ""
        raise MismatchError(f"{path} has no {absent}{at}; it has {sorted(map(str, have))}", path=path)
    for key, value in wanted:
        yield from _leaves(value, held[key], join(name, named.get(key, key)), path)


def _merged(objects: Any, held: Any, made: Materialiser) -> Any:
    """The objects in their places, and all else that the file has beside them."""
    if _loads(objects):
        return objects
    if isinstance(objects, Mapping):
        rest = {made.key(key): made.of(value) for key, value in held.items() if key not in objects}
        return {**rest, **{key: _merged(value, held[key], made) for key, value in objects.items()}}
    items = [_merged(value, held[index], made) for index, value in enumerate(objects)]
    return type(held)((*items, *(made.of(value) for value in held[len(items) :])))


def _refuse_pickled(name: str, held: object, path: str) -> None:
    """Someone's class stands for no state, and in one for nothing that could be given to an object."""
    called = repr(name) if name else "the object"
    if isinstance(held, Inert):
        reason = f"{called} in the file is a pickled {class_name(held) or 'object'}, not its state dict"
    elif (odd := next(objects_in(held), None)) is not None:
        reason = f"the state of {called} in the file holds {described(odd)}, which is not rebuilt"
    else:
        return
    raise MismatchError(
        f"{path}: {reason} (save {name or 'the object'}.state_dict(), of plain data). Nothing was changed.", path=path
    )


def _planned(ckpt: Checkpoint, name: str, target: nn.Module, options: Options) -> tuple[Work, Options]:
    mine = replace(options, key=name or None)
    work = make_work(ckpt, target, mine)
    found = work.plan.key
    if found and not f"{found}.".startswith(f"{name}."):  # key= takes a path's last parts; a place is a place
        reason = f"{name!r} in the file holds no weights (those at {found!r} are of another place)"
        raise MismatchError(f"{ckpt.path}: {reason}. Nothing was changed.", plan=work.plan, path=ckpt.path)
    check(work, mine)
    return work, mine


def _load_others(objects: list[_Leaf], undo: Undo) -> None:
    for name, target, state in objects:
        if hasattr(target, "state_dict"):
            _remember(target, undo)
        try:
            own = target.state_dict() if hasattr(target, "state_dict") else None
            target.load_state_dict(with_own_keys(state, own))
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            message = f"{name or type(target).__name__} would not load its state: {why}."
            raise CheckpointError(
                message + ("" if undo.lost else " Nothing was changed."), name=name or None
            ) from error


def _remember(target: Any, undo: Undo) -> None:
    before = copy.deepcopy(target.state_dict())
    undo.then(lambda: target.load_state_dict(before))
