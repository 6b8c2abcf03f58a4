"""Call what belongs to the model's own code in a load: own loading, extra state, post-hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy

from anycard.errors import MismatchError
from anycard.names.paths import join
from anycard.pickles.stubs import Inert
from anycard.torch.reading import materialise, read_tensor
from anycard.torch.self_loading import overrides_entry, run_own_loading
from anycard.torch.survey import Target
from anycard.torch.undo import Undo
from anycard.torch.work import OwnLoader, Work
from anycard.warning import warn


def call_loaders(work: Work, undo: Undo | None, strict: bool, *, check: bool) -> None:
    """Let modules that compute on load do so, with real tensors; `check`: their CRCs.

    Raises:
        MismatchError: One refused what the file holds. The model is as it was.
    """
    for loader in work.called:
        if undo is not None:
            _remember(loader.module, undo)
        with _sparing(loader.spared):
            _call(loader, work, strict, check)


@contextmanager
def _sparing(targets: Sequence[Target]) -> Iterator[None]:
    """Give these their tensors and values back, whatever is done to them meanwhile."""
    kept = [(target, target.tensor.detach().clone()) for target in targets if not is_lazy(target.tensor)]
    try:
        yield
    finally:
        with torch.no_grad():
            for target, old in kept:
                if not old.is_meta:
                    target.tensor.detach().copy_(old)
                    target.slots[target.attribute] = target.tensor  # type: ignore[index]


def _remember(module: nn.Module, undo: Undo) -> None:
    tensors = (*module.parameters(), *module.buffers())
    undo.keep_bytes(tensors)
    for inner in module.modules():
        undo.keep_slots(inner)


def _call(loader: OwnLoader, work: Work, strict: bool, check: bool) -> None:
    state: OrderedDict[str, Any] = OrderedDict((n, read_tensor(i, n, check=check)) for n, i in loader.given.items())
    for module, name, value in work.extras:
        if any(module is inner for inner in loader.module.modules()):
            state[name] = _extra(value, name)
    _give_memory(loader.module)
    name = loader.name or type(loader.module).__name__
    prefix = loader.live + "." if loader.live else ""
    missing: list[str] = []
    unexpected: list[str] = []
    try:
        if overrides_entry(loader.module):
            errors = _enter(loader, state, prefix, strict and not loader.spared)
        else:
            errors = run_own_loading(loader.module, prefix, state, loader.metadata, missing, unexpected)
    except Exception as error:
        raise _refused(name, str(error), work) from error
    if strict:
        spared = {target.name for target in loader.spared}
        missing = [n for n in missing if join(loader.name, n.removeprefix(prefix)) not in spared]
        errors += [f"missing {n}" for n in missing] + [f"unexpected {n}" for n in unexpected]
    if errors:
        raise _refused(name, "; ".join(errors), work)


def _enter(loader: OwnLoader, state: OrderedDict[str, Any], prefix: str, strict: bool) -> list[str]:
    """The outermost module's own `load_state_dict`."""
    given: OrderedDict[str, Any] = OrderedDict((n.removeprefix(prefix), t) for n, t in state.items())
    below = {p.removeprefix(prefix): m for p, m in loader.metadata.items() if p.startswith(prefix)}
    root = loader.metadata.get(loader.live)
    given._metadata = {**below, **({"": root} if root else {})}  # type: ignore[attr-defined]
    try:
        loader.module.load_state_dict(given, strict=strict)
    except TypeError:  # an override without `strict`
        loader.module.load_state_dict(given)
    return []


def _refused(name: str, why: str, work: Work) -> MismatchError:
    message = f"{name} loads itself and refused: {why.rstrip('.')}. The model was not changed."
    return MismatchError(message, plan=work.plan, path=work.plan.path)


def _give_memory(module: nn.Module) -> None:
    """Memory for what stands on the meta device, ties kept."""
    made: dict[int, torch.Tensor] = {}
    for inner in module.modules():
        for held in (inner._parameters, inner._buffers):
            for name, tensor in list(held.items()):
                if tensor is None or not tensor.is_meta or is_lazy(tensor):
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _with_memory(tensor)
                held[name] = made[id(tensor)]  # type: ignore[assignment]


def _with_memory(tensor: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty_like(tensor.detach(), device="cpu")
    return nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


def check_extras(work: Work) -> None:
    """Refuse extra state that is an object, before anything is changed."""
    for _, name, value in work.extras:
        _extra(value, name)


def _extra(value: object, name: str) -> Any:
    odd = next(_objects_in(value), None)
    if odd is not None:
        raise MismatchError(
            f"{name}: the extra state holds an object of {getattr(odd, 'path', odd)}, which is not rebuilt; "
            "strict=False loads the rest. The model was not changed."
        )
    return materialise(value)


def _objects_in(value: object) -> Iterator[object]:
    """What is no plain data in containers of it, which may hold themselves."""
    stack, seen = [value], set()
    while stack:
        held = stack.pop()
        if isinstance(held, (Inert, type)):
            yield held
        elif isinstance(held, (Mapping, list, tuple, set, frozenset)) and id(held) not in seen:
            seen.add(id(held))
            stack += [*held.keys(), *held.values()] if isinstance(held, Mapping) else held


def set_extras(work: Work, undo: Undo | None, strict: bool) -> None:
    """Give modules their extra state back, but those that had it in their own loading."""
    called = {id(m) for loader in work.called for m in loader.module.modules()}
    for module, name, value in work.extras:
        if id(module) in called:
            continue
        try:
            state = _extra(value, name)
        except MismatchError:
            if strict:
                raise
            warn(f"{name} was left out: its extra state is an object that is not rebuilt")
            continue
        if undo is not None:
            _remember_extra(module, undo)
        module.set_extra_state(state)


def _remember_extra(module: nn.Module, undo: Undo) -> None:
    try:
        old = copy.deepcopy(module.get_extra_state())
    except Exception:  # noqa: BLE001 - a module that has none to give yet
        return
    undo.then(lambda: module.set_extra_state(old))


def run_post_hooks(modules: Iterable[nn.Module]) -> None:
    """The modules' `load_state_dict` post-hooks, last of all."""
    for module in modules:
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys([], []))
