"""From a checkpoint and a live model to a checked `Work`: the plan, and what to do for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from anycard.checkpoint import Checkpoint
from anycard.names.choosing import by_key
from anycard.names.stored import StateDict
from anycard.plans.load_plan import LoadPlan, nearest_names
from anycard.plans.matching import Match, Only, Rename, find, infos, selected
from anycard.tensors import DTYPES, TensorInfo
from anycard.torch.dtypes import FROM_TORCH, TO_TORCH
from anycard.torch.modules import (
    Target,
    canonical_name,
    canonical_paths,
    refuse_assigned_state_dict,
    targets,
    unwrapped,
    walk,
)
from anycard.torch.self_loading import Trace, counts_batches, loads_itself, trace


@dataclass
class Options:
    """The arguments of `load` and `plan` that shape a plan."""

    device: torch.device | None = None
    dtype: torch.dtype | str | None = None
    strict: bool = True
    key: str | None = None
    rename: Rename | None = None
    only: Only | None = None


@dataclass
class OwnLoader:
    """A module that loads itself: traced, or to be called with real tensors."""

    module: nn.Module
    name: str
    live: str
    given: dict[str, TensorInfo]
    trace: Trace


@dataclass
class Work:
    """A plan, and the live things that it speaks of.

    Attributes:
        fills: Target -> stored tensor; one target for each distinct tensor of the model.
        zeros: Counters that old files lack.
        extras: Module path -> (module, stored extra state).
    """

    plan: LoadPlan
    model: nn.Module
    match: Match
    fills: list[tuple[Target, TensorInfo]] = field(default_factory=list)
    zeros: list[Target] = field(default_factory=list)
    loaders: list[OwnLoader] = field(default_factory=list)
    extras: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    conflicts: list[tuple[str, TensorInfo, str, TensorInfo]] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)


def make_work(ckpt: Checkpoint, model: nn.Module, options: Options) -> Work:
    """Match, trace and check; touches nothing.

    Raises:
        ChoiceError: Several state dicts fit, or none is there.
        CheckpointError: `model.state_dict` was overwritten by an assignment.
    """
    refuse_assigned_state_dict(model)
    wanted = [t for t in targets(model) if not t.own]
    shapes = {t.name: _shape(t) for t in wanted}
    candidates: Sequence[StateDict] = ckpt.state_dicts
    if options.key is not None:
        candidates = [by_key(candidates, options.key, ckpt.path)]
    match = find(candidates, shapes, options.rename, ckpt.path)
    plan = LoadPlan(ckpt.path, type(unwrapped(model)).__name__, match.where, total=len(shapes))
    work = Work(plan, model, match)
    stored = infos(match) | _second_names(ckpt, match)
    _Planner(work, wanted, stored, options, ckpt).run()
    return work


def _shape(target: Target) -> tuple[int, ...]:
    try:
        return tuple(target.tensor.shape)
    except RuntimeError:  # an uninitialised parameter of a lazy module has no shape yet
        return (-1,)


def _second_names(ckpt: Checkpoint, match: Match) -> dict[str, TensorInfo]:
    """Tied names that a safetensors file keeps in its metadata only."""
    if ckpt.format != "safetensors" or match.prefix:
        return {}
    held = match.source.tensors
    return {n: held[k] for n, k in ckpt.metadata.items() if isinstance(k, str) and k in held and n not in held}


class _Planner:
    """The steps of planning; each fills a part of the work."""

    def __init__(
        self,
        work: Work,
        wanted: list[Target],
        stored: dict[str, TensorInfo],
        options: Options,
        ckpt: Checkpoint,
    ) -> None:
        self.work = work
        self.plan = work.plan
        self.wanted = {t.name: t for t in wanted}
        self.stored = stored
        self.options = options
        self.ckpt = ckpt
        self.chosen = set(self.wanted)
        if options.only is not None:
            self.chosen = selected(self.wanted, options.only)
        self.versions = {**match_versions(work.match), **_marked_versions(ckpt)}
        self.missing: list[str] = []
        self.used: set[str] = set()

    def run(self) -> None:
        self._own_loaders()
        handled = self._handled()
        for name, target in self.wanted.items():
            if name in self.chosen and name not in handled:
                self._plain(name, target)
        self._wrapper_state()
        self._extra_state()
        self._ties()
        self._leftovers()
        self._describe()

    def _handled(self) -> set[str]:
        prefixes = [loader.name for loader in self.work.loaders]
        return {n for n in self.wanted for p in prefixes if not p or n == p or n.startswith(p + ".")}

    def _plain(self, name: str, target: Target) -> None:
        info = self.stored.get(name)
        if info is None:
            self._absent(name, target)
            return
        self.used.add(name)
        self._pair(target, info)

    def _pair(self, target: Target, info: TensorInfo) -> None:
        own = _shape(target)
        if info.shape != own and not (own == () and info.shape == (1,)):
            self.plan.shapes[target.name] = (info.shape, own)
            return
        have = FROM_TORCH[self.final_dtype(target, info)]
        if info.dtype != have:
            self.plan.casts[target.name] = (info.dtype, have)
            if _loses_kind(info.dtype, have):
                self.plan.refused = (*self.plan.refused, target.name)
                return
        self.work.fills.append((target, info))
        self.plan.nbytes += info.nbytes

    def final_dtype(self, target: Target, info: TensorInfo) -> torch.dtype:
        """The dtype that the target will have."""
        own = target.tensor.dtype
        return final_dtype(own, info, self.options.dtype)

    def _absent(self, name: str, target: Target) -> None:
        version = self.versions.get(name.rpartition(".")[0])
        counter = target.attribute == "num_batches_tracked" and counts_batches(target.module)
        if counter and (version is None or version < 2):
            self.work.zeros.append(target)
            return
        self.missing.append(name)

    def _own_loaders(self) -> None:
        live_of = {canonical: live for live, canonical, _ in walk(self.work.model)}
        tops: list[str] = []
        for live, canonical, module in walk(self.work.model):
            if any(not top or canonical == top or canonical.startswith(top + ".") for top in tops):
                continue
            if loads_itself(module):
                tops.append(canonical)
                self._trace(module, canonical, live, live_of)

    def _trace(self, module: nn.Module, name: str, live: str, live_of: Mapping[str, str]) -> None:
        prefix = name + "." if name else ""
        mine = {n: i for n, i in self.stored.items() if n.startswith(prefix)}
        given = {_live_name(n, live_of): i for n, i in mine.items()}
        back = {_live_name(n, live_of): n for n in mine}
        versions = {_live_path(p, live_of): v for p, v in self.versions.items()}
        traced = trace(module, live + "." if live else "", given, versions)
        loader = OwnLoader(module, name, live, given, traced)
        self.work.loaders.append(loader)
        if traced.computed:
            self.used |= set(mine)
            self.plan.called = (*self.plan.called, name or type(module).__name__)
            self.plan.nbytes += sum(i.nbytes for i in mine.values())
        else:
            self._from_trace(loader, prefix, back)

    def _from_trace(self, loader: OwnLoader, prefix: str, back: Mapping[str, str]) -> None:
        paths = canonical_paths(self.work.model)
        traced = loader.trace
        copies = {canonical_name(t, paths): back[s] for t, s in traced.copies.items()}
        unexpected = {back.get(n, n) for n in traced.unexpected}
        absent = {canonical_name(n, paths) for n in traced.missing}
        for name, target in self.wanted.items():
            if not name.startswith(prefix) or name not in self.chosen:
                continue
            if name in copies:
                self.used.add(copies[name])
                self._pair(target, self.stored[copies[name]])
                if copies[name] != name:
                    self.plan.renamed[self._stored_name(copies[name])] = name
            elif name in self.stored and name not in absent:
                self._plain(name, target)
            else:
                self._absent(name, target)
        self.used |= {n for n in back.values() if n not in unexpected}

    def _stored_name(self, name: str) -> str:
        return self.work.match.names.get(name, name)

    def _wrapper_state(self) -> None:
        """A wrapper's own counters, where the file has them; `n_averaged` without one becomes 1."""
        held = self.ckpt.mark.get("wrappers", {})
        for target in targets(self.work.model):
            if not target.own:
                continue
            stored = next(
                (i for n, i in self.work.match.source.tensors.items() if n.rpartition(".")[2] == target.attribute),
                None,
            )
            if stored is not None:
                self.work.fills.append((target, stored))
            elif isinstance(held, dict) and isinstance(held.get(target.attribute), int):
                self.work.unset.append(f"{target.attribute}={held[target.attribute]}")
            else:
                self.work.unset.append(f"{target.attribute}=1")
                self.plan.notes.append(
                    f"{target.attribute} is not in the file: set to 1, so that the next average keeps these weights"
                )

    def _extra_state(self) -> None:
        extras = self.work.match.source.extras
        for _, canonical, module in walk(self.work.model):
            if type(module).set_extra_state is nn.Module.set_extra_state:
                continue
            name = f"{canonical}._extra_state" if canonical else "_extra_state"
            stored = next((n for n in extras if n == name or n.endswith("." + name)), None)
            if name in self.stored:
                self.used.add(name)
                self.work.extras.append((module, name, self.stored[name]))
            elif stored is not None:
                self.work.extras.append((module, name, extras[stored]))
            elif not (self.options.only is not None):
                self.missing.append(name)

    def _ties(self) -> None:
        """One fill for each tensor; a name tied to a filled one is not missing."""
        groups: dict[int, list[tuple[Target, TensorInfo]]] = {}
        for target, info in self.work.fills:
            groups.setdefault(id(target.tensor), []).append((target, info))
        for group in groups.values():
            first, kept = group[0]
            for other, info in group[1:]:
                if not info.same_bytes(kept):
                    self.work.conflicts.append((first.name, kept, other.name, info))
                    self.plan.conflicts = (*self.plan.conflicts, (first.name, other.name))
        self.plan.pairs = {t.name: self._stored_name(t.name) for t, _ in self.work.fills}
        self.missing = [n for n in self.missing if n not in self.wanted or id(self.wanted[n].tensor) not in groups]
        self.work.fills = [group[0] for group in groups.values()]

    def _leftovers(self) -> None:
        dropped: list[str] = []
        hidden = {f"{c}.{b}" if c else b for _, c, m in walk(self.work.model) for b in m._non_persistent_buffers_set}
        for name in self.stored:
            if name in self.used or name in self.wanted or name.endswith("_extra_state"):
                continue
            (dropped if name in hidden else self.missing_list).append(name)
        if dropped:
            self.plan.notes.append(f"dropped, since the model no longer stores them: {', '.join(dropped)}")
        if self.options.only is None:
            outside = list(self.work.match.outside) if not self._lightning() else []
            self.plan.unexpected = (*self.missing_list, *outside)
        self.plan.missing = tuple(self.missing)

    @property
    def missing_list(self) -> list[str]:
        """Stored names that nothing of the model wants."""
        return self.__dict__.setdefault("_unexpected", [])  # type: ignore[no-any-return]

    def _lightning(self) -> bool:
        tree = self.ckpt.tree
        beside = self.work.match.outside
        if isinstance(tree, dict) and "pytorch-lightning_version" in tree and not self.missing:
            if beside:
                self.plan.notes.append(f"beside the model in the Lightning module: {', '.join(beside[:20])}")
            return True
        return False

    def _describe(self) -> None:
        plan = self.plan
        for name, stored in plan.pairs.items():
            if stored != name and stored not in plan.renamed:
                plan.renamed[stored] = name
        if self.work.zeros:
            names = ", ".join(t.name for t in self.work.zeros[:3])
            plan.notes.append(f"{len(self.work.zeros)} counters that old files lack start as they are or at 0: {names}")
        for loader in self.work.loaders:
            how = "is called with real tensors" if loader.trace.computed else "was asked what goes where"
            plan.notes.append(f"{loader.name or type(loader.module).__name__} loads itself and {how}")
        spare = {n: self.stored[n] for n in plan.unexpected if n in self.stored}
        own = {n: _shape(t) for n, t in self.wanted.items()}
        plan.nearest = nearest_names(tuple(n for n in plan.missing if n in own), own, spare)


def match_versions(match: Match) -> dict[str, int]:
    """Module versions under canonical paths."""
    from anycard.names.wrappers import outer_prefix, without_segments

    held = {without_segments(path): version for path, version in match.source.versions.items()}
    start = outer_prefix(without_segments(n) for n in match.source.tensors) + (
        match.prefix + "." if match.prefix else ""
    )
    return {path.removeprefix(start) if start else path: version for path, version in held.items()}


def _marked_versions(ckpt: Checkpoint) -> dict[str, int]:
    held = ckpt.mark.get("versions", {})
    return {str(k): v for k, v in held.items() if isinstance(v, int)} if isinstance(held, dict) else {}


def _live_path(path: str, live_of: Mapping[str, str]) -> str:
    return live_of.get(path, path)


def _live_name(name: str, live_of: Mapping[str, str]) -> str:
    head = name
    while head:
        head = head.rpartition(".")[0]
        if head in live_of:
            rest = name[len(head) + 1 :] if head else name
            return f"{live_of[head]}.{rest}" if live_of[head] else rest
    return name


def final_dtype(own: torch.dtype, info: TensorInfo, asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype that a tensor ends up with; `dtype=` counts for floating-point tensors only."""
    if asked == "auto":
        return TO_TORCH[info.dtype] if own.is_floating_point and DTYPES[info.dtype].kind == "float" else own
    if isinstance(asked, torch.dtype) and own.is_floating_point:
        return asked
    return own


_KINDS = {"bool": 0, "int": 1, "float": 2, "complex": 3}


def _loses_kind(stored: str, own: str) -> bool:
    have, want = _KINDS.get(DTYPES[stored].kind), _KINDS.get(DTYPES[own].kind)
    return have is None or want is None or have > want
