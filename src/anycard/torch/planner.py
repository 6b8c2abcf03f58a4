"""The steps of planning a load where the file and the model do not agree one by one. Touches nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.checkpoint import Checkpoint
from anycard.names.choosing import canonical_names
from anycard.names.paths import join, translated
from anycard.plans.load_plan import nearest_names
from anycard.plans.matching import (
    asked_for,
    canonical_metadata,
    extra_states,
    infos,
    selected,
    versions_of_classes,
)
from anycard.tensors import TensorInfo, row_major
from anycard.torch.dtypes import FROM_TORCH, TO_TORCH
from anycard.torch.modules import canonical_paths, children_first, live_paths, unwrapped
from anycard.torch.reading import Fill, Fills
from anycard.torch.self_loading import Trace, counts_batches, named_in, overrides_entry, trace
from anycard.torch.survey import Survey, Target
from anycard.torch.work import Options, OwnLoader, Work, final_dtype, loses_kind


class Planner:
    """The steps of planning; each fills a part of the work."""

    def __init__(self, work: Work, seen: Survey, options: Options, ckpt: Checkpoint) -> None:
        self.work = work
        self.plan = work.plan
        self.options = options
        self.ckpt = ckpt
        self.seen = seen
        self.walked = seen.walked
        self.wanted = seen.targets
        self.stored = infos(work.match)
        self.chosen: Collection[str] = self.wanted.keys()
        if options.only is not None:
            self.chosen = selected(self.wanted, options.only)
        self.missing: list[str] = []
        self.spare_extras: list[str] = []
        self.used: set[str] = set()
        self.fills: list[Fill] = []

    @cached_property
    def live(self) -> dict[str, str]:
        """Canonical module path -> the path in the module tree."""
        return live_paths(self.walked)

    @cached_property
    def metadata(self) -> dict[str, dict[str, Any]]:
        """Canonical module path -> what the file says of that module.

        A whole model's classes keep their version in code, so it is today's; and our safetensors files and
        whole models leave out what is version 1.
        """
        found = canonical_metadata(self.work.match, self.ckpt.mark)
        if self._of_classes:
            return {path: {"version": module._version} for _, path, module in self.walked}
        if "metadata" in self.ckpt.mark:
            return {**{path: {"version": 1} for _, path, _ in self.walked}, **found}
        return found

    @cached_property
    def _of_classes(self) -> bool:
        return versions_of_classes(self.work.match.source, self.ckpt.mark)

    def run(self) -> None:
        handled = self._own_loaders()
        apart = handled or self.options.only is not None
        names = [n for n in self.wanted if n in self.chosen and n not in handled] if apart else self.wanted
        for name in names:
            self._by_name(name, self.wanted[name])
        self._wrapper_state()
        self._extra_state()
        self._ties()
        self._leftovers()
        self._describe()

    def _by_name(self, name: str, target: Target) -> None:
        info = self.stored.get(name)
        if info is None:
            self._absent(name, target)
            return
        self.used.add(name)
        self._pair(target, info)

    def _pair(self, target: Target, info: TensorInfo) -> None:
        if info.shape != target.shape and not (target.shape == () and info.shape == (1,)):
            self.plan.shapes[target.name] = (info.shape, target.shape)
            return
        layout = target.tensor.layout
        if layout is not torch.strided and not is_lazy(target.tensor):
            self.plan.layouts[target.name] = str(layout).removeprefix("torch.")
            return
        have = FROM_TORCH[final_dtype(target.tensor.dtype, info, self.options.dtype)]
        if info.dtype != have:
            self.plan.casts[target.name] = (info.dtype, have)
            if loses_kind(info.dtype, have):
                self.plan.refused = (*self.plan.refused, target.name)
                return
        self.fills.append(_fill(target, info))

    def _absent(self, name: str, target: Target) -> None:
        version = self.metadata.get(name.rpartition(".")[0], {}).get("version")
        counter = target.attribute == "num_batches_tracked" and counts_batches(target.module)
        whole = self._of_classes or self.work.match.source.canonical is not None
        if counter and (whole or not isinstance(version, int) or version < 2):
            self.work.counters.append(target)
        else:
            self.missing.append(name)

    def _own_loaders(self) -> set[str]:
        """Ask the modules that load themselves; gives the names that they answer for."""
        handled: set[str] = set()
        top: str | None = None
        root = unwrapped(self.work.model)
        own_entry = overrides_entry(root)
        found = self.seen.self_loaders
        if own_entry:
            found = [row for row in self.walked if row[2] is root] + [row for row in found if row[2] is not root]
        for live, canonical, module in found:
            if top is not None and (not top or canonical == top or canonical.startswith(top + ".")):
                continue  # the walk goes down before it goes on, so all below a module follows it at once
            entry = own_entry and module is root
            top = canonical
            prefix = canonical + "." if canonical else ""
            inner = set(map(id, module.modules()))
            mine = {n for n, t in self.wanted.items() if n.startswith(prefix) and id(t.module) in inner}
            if self.options.only is None or not mine.isdisjoint(self.chosen):
                self._ask(module, canonical, live, entry)
            handled |= mine
        return handled

    def _ask(self, module: nn.Module, name: str, live: str, entry: bool) -> None:
        prefix = name + "." if name else ""
        back = {translated(n, self.live): n for n in self.stored if n.startswith(prefix)}
        given = {live_name: self.stored[n] for live_name, n in back.items()}
        metadata = {self.live.get(path, path): held for path, held in self.metadata.items()}
        if entry:
            found = Trace(computed=True)  # its entry is its own: nothing short of a call says what it does
        else:
            found = trace(module, live + "." if live else "", given, metadata)
        mine = {n: t for n, t in self.wanted.items() if n.startswith(prefix)}
        asked = {id(t.tensor) for n, t in mine.items() if n in self.chosen}
        spared = [t for t in mine.values() if id(t.tensor) not in asked]
        loader = OwnLoader(module, name, live, given, metadata, found, spared)
        copies = {} if found.computed else self._copies(loader, back)
        how = "was asked what goes where"
        if copies is None or found.computed:
            how = "is called with real tensors" + ("; what only= leaves out gets its values back" if spared else "")
            self._to_be_called(loader, back)
        else:
            self.work.hooked += children_first(module)
            self._from_trace(loader, prefix, back, copies)
        self.plan.notes.append(f"{name or type(module).__name__} loads itself and {how}")

    def _copies(self, loader: OwnLoader, back: Mapping[str, str]) -> dict[str, tuple[str, TensorInfo]] | None:
        """Canonical name -> stored name and tensor, reshaped as the module did; None where that takes a call."""
        paths = canonical_paths(self.walked)
        copies = {}
        for target, source in loader.trace.copies.items():
            name = translated(target, paths)
            if name not in self.wanted:
                return None  # a buffer that is not stored, which only the call fills
            info = loader.given[source]
            own = self.wanted[name].shape
            if info.shape != own and own != ():
                if not info.contiguous:
                    return None
                info = info.replace(shape=own, stride=row_major(own))
            copies[name] = (back[source], info)
        return copies

    def _to_be_called(self, loader: OwnLoader, back: Mapping[str, str]) -> None:
        found = loader.trace
        self.work.called.append(loader)
        self.plan.called = (*self.plan.called, loader.name or type(loader.module).__name__)
        unexpected = {back[n] for n in found.unexpected if n in back} if found.reported else set()
        self.used |= {n for n in back.values() if n not in unexpected}
        self.plan.nbytes += sum(info.nbytes for info in loader.given.values())
        self._say_without_dtype(loader)
        if found.reported:
            paths = canonical_paths(self.walked)
            missing = [translated(n, paths) for n in found.missing if not n.endswith("_extra_state")]
            self.missing += [n for n in missing if n in self.chosen or n not in self.wanted]
            return
        prefix = loader.name + "." if loader.name else ""
        lacking = [n for n in self.wanted if n.startswith(prefix) and n in self.chosen and n not in self.stored]
        if lacking:
            names = ", ".join(lacking)
            self.plan.notes.append(f"not in the file under these names, which only the call can tell of: {names}")

    def _say_without_dtype(self, loader: OwnLoader) -> None:
        """A module that is called gets the file's dtypes by its tensors' names alone."""
        prefix = loader.name + "." if loader.name else ""
        inside = {n: t for n, t in self.wanted.items() if n.startswith(prefix) and n in self.chosen}
        own = [n for n, t in inside.items() if t.dtype.is_floating_point and n not in self.stored]
        if own and self.options.dtype == "auto":
            names = ", ".join(own)
            self.plan.notes.append(f"dtype='auto' keeps the model's where the file has no such name: {names}")

    def _from_trace(
        self,
        loader: OwnLoader,
        prefix: str,
        back: Mapping[str, str],
        copies: Mapping[str, tuple[str, TensorInfo]],
    ) -> None:
        paths = canonical_paths(self.walked)
        unexpected = {back.get(n, n) for n in loader.trace.unexpected}
        absent = {translated(n, paths) for n in loader.trace.missing}
        kept: list[str] = []
        for name, target in self.wanted.items():
            if not name.startswith(prefix) or name not in self.chosen:
                continue
            if name in copies:
                source, info = copies[name]
                self.used.add(source)
                self._pair(target, info)
                if source != name:
                    self.plan.renamed[self._stored_name(source)] = name
            elif name in self.stored and self._is_named(loader, name):
                self._by_name(name, target)
            elif name in absent:
                self._absent(name, target)
            else:
                kept.append(name)
        if kept:
            self.plan.notes.append(f"left as they are, as the module itself says: {', '.join(kept)}")
        self.used |= {n for n in back.values() if n not in unexpected}
        self.plan.objections += tuple(e for e in loader.trace.errors if not self._is_of_a_shape(e, prefix))

    def _is_named(self, loader: OwnLoader, name: str) -> bool:
        return any(named_in(error, translated(name, self.live)) for error in loader.trace.errors)

    def _is_of_a_shape(self, error: str, prefix: str) -> bool:
        """What a module says is of a tensor's shape, which the plan shows; else it is to be told as it says it."""
        about = [n for n in self.wanted if n.startswith(prefix) and named_in(error, translated(n, self.live))]
        shapes = [(self.stored[n].shape, self.wanted[n].shape) for n in about if n in self.stored]
        return any(stored != own for stored, own in shapes)

    def _stored_name(self, name: str) -> str:
        return self.work.match.names.get(name, name)

    def _wrapper_state(self) -> None:
        """A wrapper's own counters, where the file has them; `n_averaged` without one becomes 1."""
        match, marked = self.work.match, self.ckpt.mark.get("wrappers", {})
        only = self.options.only
        for target in self.seen.own if only is None else [t for t in self.seen.own if asked_for(t.name, only)]:
            stored = match.wrapper_state.get(target.name)
            value = marked.get(join(match.where, target.name)) if isinstance(marked, dict) else None
            if stored is not None:
                self.fills.append(_fill(target, match.source.tensors[stored]))
            elif isinstance(value, int):
                self.work.wrapper_state.append((target, value))
            else:
                self.work.wrapper_state.append((target, 1))
                self.plan.notes.append(
                    f"{target.attribute} is not in the file: set to 1, so that the next average keeps these weights"
                )

    def _extra_state(self) -> None:
        extras = self.work.match.source.extras
        wanted = {join(canonical, "_extra_state"): module for _, canonical, module in self.seen.extras}
        if (only := self.options.only) is not None:
            wanted = {name: module for name, module in wanted.items() if asked_for(name, only)}
        found = extra_states(self.work.match, [name for name in wanted if name not in self.stored])
        for name, module in wanted.items():
            if name in self.stored:
                self.used.add(name)
                self.work.extras.append((module, name, self.stored[name]))
            elif name in found:
                self.work.extras.append((module, name, extras[found[name]]))
            elif only is None:
                self.missing.append(name)
        self.spare_extras = [name for name in extras if name not in found.values()]

    def _ties(self) -> None:
        """One fill for each tensor; a name tied to a filled one is not missing."""
        names = self.work.match.names
        self.plan.pairs = {fill.name: names.get(fill.name, fill.name) for fill in self.fills}
        groups: dict[int, list[Fill]] = {}
        for fill in self.fills:
            groups.setdefault(id(fill.tensor), []).append(fill)
        for group in groups.values():
            first = group[0]
            for other in group[1:]:
                if other.info.place != first.info.place:
                    self.work.conflicts.append((first.name, first.info, other.name, other.info))
                    self.plan.conflicts = (*self.plan.conflicts, (first.name, other.name))
        self.missing = [n for n in self.missing if n not in self.wanted or id(self.wanted[n].tensor) not in groups]
        self.work.fills = Fills.of([group[0] for group in groups.values()])
        self.plan.nbytes += sum(info.nbytes for info in self.work.fills.infos)

    def _leftovers(self) -> None:
        hidden = self.seen.hidden
        left = [n for n in self.stored if not (n in self.used or n in self.wanted)]
        left += self.spare_extras
        dropped = [n for n in left if n in hidden]
        if dropped:
            self.plan.notes.append(f"dropped, since the model no longer stores them: {', '.join(dropped)}")
        if self.options.only is None:
            outside = [] if self._lightning() else self._outside()
            self.plan.unexpected = (*(n for n in left if n not in hidden), *outside)
        self.plan.missing = tuple(dict.fromkeys(self.missing))
        if bare := self.seen.bare:
            called = {id(m) for loader in self.work.called for m in loader.module.modules()}
            filled = set(map(id, self.work.fills.tensors))
            filled |= {id(target.tensor) for target in self.work.counters}
            self.plan.unfillable = tuple(
                name for name, tensor, module in bare if id(module) not in called and id(tensor) not in filled
            )

    def _outside(self) -> list[str]:
        """Canonical names of what the file has beside the part that the model is."""
        match = self.work.match
        names, _ = canonical_names(match.source, marked=self.ckpt.marked) if match.outside else ({}, ())
        return [names.get(name, name) for name in match.outside]

    def _lightning(self) -> bool:
        """What a Lightning module holds beside the model (metrics, losses) is no reason to refuse."""
        tree = self.ckpt.tree
        if not isinstance(tree, dict) or "pytorch-lightning_version" not in tree or self.missing:
            return False
        if self.work.match.outside:
            beside = ", ".join(self.work.match.outside[:20])
            self.plan.notes.append(f"beside the model in the Lightning module: {beside}")
        return True

    def _describe(self) -> None:
        plan = self.plan
        for name, stored in plan.pairs.items():
            if stored != name and stored not in plan.renamed:
                plan.renamed[stored] = name
        if self.work.counters:
            names = ", ".join(t.name for t in self.work.counters[:3])
            plan.notes.append(f"{len(self.work.counters)} counters that old files lack stay, or start at 0: {names}")
        spare = {n: i for n, i in self.stored.items() if not (n in self.used or n in self.wanted)}
        own = {n: t.shape for n, t in self.wanted.items()}
        plan.nearest = nearest_names(tuple(n for n in plan.missing if n in own), own, spare)


def _fill(target: Target, info: TensorInfo) -> Fill:
    alike = target.plain and info.shape == target.shape and TO_TORCH.get(info.dtype) is target.dtype
    return Fill(target.tensor, info, target.name, target.plain, alike)
