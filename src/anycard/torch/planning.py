"""From a checkpoint and a live model to a checked `Work`: the plan, and what to do for it. Touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from anycard.checkpoint import Checkpoint
from anycard.names.choosing import by_key
from anycard.names.stored import StateDict
from anycard.plans.load_plan import LoadPlan
from anycard.plans.matching import (
    Match,
    Rename,
    find,
    last_resorts,
    renamed,
)
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.modules import unwrapped
from anycard.torch.planner import Planner
from anycard.torch.reading import Fills
from anycard.torch.self_loading import overrides_entry
from anycard.torch.survey import Survey, survey
from anycard.torch.work import Options, Work


def make_work(ckpt: Checkpoint, model: nn.Module, options: Options) -> Work:
    """Match, trace and check; touches nothing.

    Raises:
        ChoiceError: Several state dicts fit, or none is there.
        CheckpointError: `model.state_dict` was overwritten by an assignment.
    """
    seen = survey(model)
    shapes = dict(zip(seen.columns.names, seen.columns.shapes, strict=True))
    candidates: Sequence[StateDict] = ckpt.state_dicts
    unions = [held for held in ckpt.found.unions if options.key is None or held.key == options.key]
    if options.key is not None and not (unions and options.key not in {held.key for held in candidates}):
        empty = not shapes and _holds_no_tensors(ckpt, options.key)
        candidates, unions = [] if empty else [by_key(candidates, options.key, ckpt.path)], []
    rename = None if options.rename is None else Renaming(options.rename)
    match = find(candidates, unions, shapes, rename, ckpt.path)
    work = _agreeing(ckpt, seen, match, options) or _planned(ckpt, seen, match, options)
    if rename is not None and not rename.changed and match.names:
        work.idle = f"rename= changes none of the file's names, such as {next(iter(match.names))!r}"
        work.plan.notes.append(work.idle)
    if not match.hits and not work.plan.fits and options.rename is None and seen.self_loaders:
        for other in last_resorts(candidates, shapes):
            again = _planned(ckpt, seen, other, options)
            if again.plan.fits:
                return again
    return work


class Renaming:
    """A caller's renames, and whether they changed any name."""

    def __init__(self, rename: Rename) -> None:
        self._rename = rename
        self.changed = False

    def __call__(self, name: str) -> str:
        new = renamed(name, self._rename)
        self.changed |= new != name
        return new


def _holds_no_tensors(ckpt: Checkpoint, key: str) -> bool:
    """An object of the file that is there and has none: what `save` writes of a loss, for one."""
    if any(name.startswith(key + ".") for name in ckpt.tensors):
        return False
    if isinstance(ckpt.tree, Mapping) and key in ckpt.tree:
        return True
    return any(name == key or name.startswith(key + ".") for name in ckpt.objects)


def _agreeing(ckpt: Checkpoint, seen: Survey, match: Match, options: Options) -> Work | None:
    """The work where the stored tensors are the model's one by one, in name, shape and dtype, and no more is asked."""
    names, tensors, shapes, dtypes, plain = seen.columns
    asked = options.dtype is not None or options.only is not None
    beside = match.outside or match.wrapper_state or match.source.extras
    own_entry = overrides_entry(unwrapped(seen.walked[0][2]))
    if asked or beside or own_entry or not seen.usual or not len(names) == len(match.names) == match.hits:
        return None
    same_names = list(match.names.values()) == list(match.names)
    stored = match.source.tensors
    infos = list(map(stored.__getitem__, names if same_names else map(match.names.__getitem__, names)))
    forms = [info.form for info in infos]
    known = {form: TO_TORCH.get(form.dtype) for form in set(forms)}
    if [form.shape for form in forms] != shapes or list(map(known.__getitem__, forms)) != dtypes:
        return None
    if len(set(map(id, tensors))) < len(tensors):
        return None  # ties
    work = _begun(ckpt, seen, match)
    work.fills = Fills(tensors, infos, names, plain, plain)
    work.plan.pairs = dict(zip(names, names if same_names else map(match.names.__getitem__, names), strict=True))
    if not same_names:
        work.plan.renamed = {held: name for name, held in match.names.items() if held != name}
    work.plan.nbytes = sum([form.nbytes for form in forms])
    return work


def _planned(ckpt: Checkpoint, seen: Survey, match: Match, options: Options) -> Work:
    work = _begun(ckpt, seen, match)
    Planner(work, seen, options, ckpt).run()
    return work


def _begun(ckpt: Checkpoint, seen: Survey, match: Match) -> Work:
    model = seen.walked[0][2]
    plan = LoadPlan(ckpt.path, type(unwrapped(model)).__name__, match.where, total=len(set(seen.columns.names)))
    return Work(plan, model, match)
