"""Call what belongs to the model's own code in a load: own loading, extra state, post-hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy

from anycard.errors import MismatchError
from anycard.names.paths import join, translated
from anycard.torch.devices import move
from anycard.torch.materialising import described, materialise, objects_in
from anycard.torch.modules import live_paths, walk
from anycard.torch.reading import read_tensor
from anycard.torch.self_loading import overrides_entry, run_own_loading
from anycard.torch.survey import Target
from anycard.torch.undo import Undo
from anycard.torch.work import Options, OwnLoader, Work, final_dtype
from anycard.warning import warn

Made = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by its id: a meta tensor, and what takes its place
_UNWRITTEN = 0xA5  # in every byte: no number that anyone stores


def call_loaders(work: Work, undo: Undo | None, options: Options, made: Made, *, check: bool) -> None:
    """Let modules that compute on load do so, with real tensors.

    Args:
        made: What takes a meta tensor's place wherever that stands; more is added.
        check: Compare the tensors' CRCs.

    Raises:
        MismatchError: One refused what the file holds, or left tensors without a value. The model is as it was.
    """
    for loader in work.called:
        if undo is not None:
            undo.keep_modules(loader.module)
        given = _make_ready(loader, options.dtype, made)
        with _sparing(loader.spared):
            _call(loader, work, options.strict, check)
        _take_back(given, made, loader, work, options.strict)


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


def _call(loader: OwnLoader, work: Work, strict: bool, check: bool) -> None:
    state: OrderedDict[str, Any] = OrderedDict((n, read_tensor(i, n, check=check)) for n, i in loader.given.items())
    paths = live_paths(walk(work.model))
    for module, name, value in work.extras:
        if any(module is inner for inner in loader.module.modules()):
            state[translated(name, paths)] = _extra(value, name)
    name = loader.name or type(loader.module).__name__
    prefix = loader.live + "." if loader.live else ""
    missing: list[str] = []
    unexpected: list[str] = []
    entered = overrides_entry(loader.module)
    try:
        if entered:
            errors = _enter(loader, state, prefix, strict and not loader.spared, missing, unexpected)
        else:
            errors = run_own_loading(loader.module, prefix, state, loader.metadata, missing, unexpected, hooks=True)
    except Exception as error:
        raise _refused(name, str(error) or type(error).__name__, work) from error
    spared = {target.name for target in loader.spared}
    missing = [n for n in missing if join(loader.name, n.removeprefix(prefix)) not in spared]
    odd = [f"missing {n}" for n in missing] + [f"unexpected {n}" for n in unexpected if not spared]
    if errors or (odd and strict and not entered):  # an entry of its own raises where it wants to
        raise _refused(name, "; ".join(errors + odd), work)
    if odd:
        warn(f"{work.plan.path}: {name} loads itself, and went on without: {'; '.join(odd)}")


def _enter(
    loader: OwnLoader,
    state: OrderedDict[str, Any],
    prefix: str,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
) -> list[str]:
    """The outermost module's own `load_state_dict`."""
    given: OrderedDict[str, Any] = OrderedDict((n.removeprefix(prefix), t) for n, t in state.items())
    below = {p.removeprefix(prefix): m for p, m in loader.metadata.items() if p.startswith(prefix)}
    root = loader.metadata.get(loader.live)
    given._metadata = {**below, **({"": root} if root else {})}  # type: ignore[attr-defined]
    try:
        told: Any = loader.module.load_state_dict(given, strict=strict)
    except TypeError:  # an override without `strict`
        told = loader.module.load_state_dict(given)
    if isinstance(told, _IncompatibleKeys):
        missing += [prefix + name for name in told.missing_keys]
        unexpected += [prefix + name for name in told.unexpected_keys]
    return []


def _refused(name: str, why: str, work: Work) -> MismatchError:
    message = f"{name} loads itself and refused: {why.rstrip('.')}. The model was not changed."
    return MismatchError(message, plan=work.plan, path=work.plan.path)


def _slots(module: nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """Every place of a module's tensors: its name, what holds it and under which attribute, what stands there."""
    for inner_path, inner in module.named_modules(prefix=path):
        for slots in (inner._parameters, inner._buffers):
            for attribute, tensor in list(slots.items()):
                if tensor is not None:
                    yield join(inner_path, attribute), slots, attribute, tensor


def _make_ready(
    loader: OwnLoader, asked: torch.dtype | str | None, made: Made
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give tensors their final dtype, so that no value passes another one, and those on the meta device memory.

    Returns:
        Meta tensor and memory, ties kept, of what nothing was read into.
    """
    given = []
    spared = {id(target.tensor) for target in loader.spared}
    for name, slots, attribute, tensor in _slots(loader.module, loader.live):
        dtype = final_dtype(tensor.dtype, None if id(tensor) in spared else loader.given.get(name), asked)
        if not tensor.is_meta:
            _cast(tensor, dtype)
            continue
        if id(tensor) not in made:
            made[id(tensor)] = tensor, _with_memory(tensor, dtype)
            given.append(made[id(tensor)])
        slots[attribute] = made[id(tensor)][1]
    return given


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype == dtype:
        return
    if is_lazy(tensor):
        tensor.data = tensor.data.to(dtype)
    else:
        move(tensor, tensor.detach().to(dtype))


def _with_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if is_lazy(tensor):
        kind: Any = type(tensor)
        return kind(requires_grad=tensor.requires_grad, device="cpu", dtype=dtype)  # type: ignore[no-any-return]
    fresh = torch.empty_like(tensor.detach(), device="cpu", dtype=dtype)
    _bytes(fresh).fill_(_UNWRITTEN)
    return nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())


def _take_back(
    given: Sequence[tuple[torch.Tensor, torch.Tensor]],
    made: Made,
    loader: OwnLoader,
    work: Work,
    strict: bool,
) -> None:
    """Tensors that the module gave no value stand on the meta device again, which is said."""
    empty = [(meta, new) for meta, new in given if not is_lazy(new) and bool((_bytes(new) == _UNWRITTEN).all())]
    back = {id(new): meta for meta, new in empty if new.numel()}
    known = {id(target.tensor) for target in (*work.counters, *loader.spared)}
    names = []
    for name, slots, attribute, tensor in _slots(loader.module, loader.name):
        meta = back.get(id(tensor))
        if meta is not None:
            slots[attribute] = meta
            made.pop(id(meta), None)
            names += [name] if id(meta) not in known else []
    if not names:
        return
    message = (
        f"no value for {', '.join(names)}: on the meta device, and {loader.name or type(loader.module).__name__}, "
        "which loads itself, takes none from the file; give a callable that builds the model instead"
    )
    if strict:
        raise MismatchError(f"{message}. The model was not changed.", plan=work.plan, path=work.plan.path)
    warn(f"{work.plan.path}: {message}")


def check_extras(work: Work) -> None:
    """Refuse extra state that is an object, before anything is changed."""
    for _, name, value in work.extras:
        _extra(value, name)


def _extra(value: object, name: str) -> Any:
    odd = next(objects_in(value), None)
    if odd is not None:
        raise MismatchError(
            f"{name}: the extra state holds {described(odd)}, which is not rebuilt; "
            "strict=False loads the rest. The model was not changed."
        )
    return materialise(value)


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
