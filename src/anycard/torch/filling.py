"""Carry out a plan on live tensors, in the order that makes a failure harmless.

All new memory is filled before any of it is put in place; modules that load themselves are called with
an undo copy of their tensors; direct reads into place come last.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from anycard.errors import CheckpointError, FormatError, MismatchError
from anycard.limits import DEFAULT, Limits
from anycard.progress import Progress, counting
from anycard.tensors import TensorInfo
from anycard.torch.modules import Target, targets, walk
from anycard.torch.planning import Options, OwnLoader, Work, final_dtype
from anycard.torch.reading import copy_into, read_tensor
from anycard.torch.self_loading import run_own_loading
from anycard.warning import warn


def fill(
    work: Work, options: Options, *, verify: bool, fresh: bool, progress: Progress, limits: Limits = DEFAULT
) -> None:
    """Fill the model as planned.

    Raises:
        FormatError: The file is damaged or ends early. An existing model is restored, or `.changed`
            names what is not.
    """
    if options.strict:
        for _, name, value in work.extras:
            _extra(value, name)
    new, inplace = _allocate(work, options)
    with counting(progress, work.plan.nbytes) as done:
        for tensor, info, name in new:
            _read(tensor, info, name, work, verify)
            done(info.nbytes)
        undo = _Undo(work, inplace, limits, keep=not fresh)
        try:
            for loader in work.loaders:
                if loader.trace.computed:
                    _call(loader, work)
            _put(work, options, new)
            for target, info in inplace:
                undo.started = True
                _read(target.tensor, info, target.name, work, verify)
                done(info.nbytes)
            _finish(work, options.strict)
        except BaseException as error:
            undo.restore(error)
            raise


def _allocate(
    work: Work, options: Options
) -> tuple[list[tuple[torch.Tensor, TensorInfo, str]], list[tuple[Target, TensorInfo]]]:
    """Tensors that get new memory, and those that are written where they are."""
    new: list[tuple[torch.Tensor, TensorInfo, str]] = []
    inplace = []
    for target, info in work.fills:
        own = target.tensor
        device = options.device or (torch.device("cpu") if own.is_meta else own.device)
        dtype = final_dtype(own.dtype, info, options.dtype)
        if own.is_meta or own.device != device or own.dtype != dtype or not _writable(own):
            new.append((_empty_like(own, dtype, device), info, target.name))
        else:
            inplace.append((target, info))
    return new, inplace


def _writable(tensor: torch.Tensor) -> bool:
    return all(step != 0 or size <= 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _empty_like(own: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_like(own.detach(), dtype=dtype, device=device)


def _read(tensor: torch.Tensor, info: TensorInfo, name: str, work: Work, verify: bool) -> None:
    try:
        copy_into(tensor, info, check=verify)
    except FormatError as error:
        raise FormatError(f"{name}: {error.args[0]}", path=work.plan.path, name=name, offset=error.offset) from None


def _put(work: Work, options: Options, new: list[tuple[torch.Tensor, TensorInfo, str]]) -> None:
    """Put new memory in the place of the old, ties kept; move what the file does not fill."""
    by_name = {target.name: target for target, _ in work.fills}
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for tensor, _, name in new:
        own = by_name[name].tensor
        replaced[id(own)] = (own, tensor)
    made: dict[int, torch.Tensor] = {}
    for target in targets(work.model):
        own = target.tensor
        if id(own) in replaced:
            _place(target, own, replaced[id(own)][1], made)
    _move_rest(work.model, options)


def _place(target: Target, own: torch.Tensor, tensor: torch.Tensor, made: dict[int, torch.Tensor]) -> None:
    held: dict[str, Any] = target.module._parameters if target.parameter else target.module._buffers
    if target.parameter and not own.is_meta:
        own.data = tensor
    elif target.parameter:
        held[target.attribute] = made.setdefault(id(own), nn.Parameter(tensor, own.requires_grad))
    else:
        held[target.attribute] = tensor


def _move_rest(model: nn.Module, options: Options) -> None:
    """What the file does not hold goes to the device and dtype, too."""
    for _, _, module in walk(model):
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is None or tensor.is_meta:
                    continue
                kind = options.dtype if isinstance(options.dtype, torch.dtype) and tensor.is_floating_point() else None
                moved = tensor.detach().to(device=options.device, dtype=kind)
                if moved.data_ptr() == tensor.data_ptr() and moved.dtype == tensor.dtype:
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = moved
                else:
                    held[name] = moved  # type: ignore[assignment]


class _Undo:
    """The old bytes of an existing model, as far as they fit the bound."""

    def __init__(self, work: Work, inplace: list[tuple[Target, TensorInfo]], limits: Limits, *, keep: bool) -> None:
        self.started = False
        self.names = tuple(target.name for target, _ in inplace) if keep else ()
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        tensors = [target.tensor for target, _ in inplace]
        for loader in work.loaders:
            if loader.trace.computed and keep:
                tensors += [t for t in (*loader.module.parameters(), *loader.module.buffers()) if not t.is_meta]
        size = sum(t.numel() * t.element_size() for t in tensors)
        self.fits = size <= limits.undo_nbytes
        if keep and self.fits:
            self.kept = [(t, t.detach().clone()) for t in tensors if not _lazy(t)]

    def restore(self, error: BaseException) -> None:
        """Write the old bytes back, or say in the error what was changed."""
        with torch.no_grad():
            for tensor, old in self.kept:
                if tensor.shape == old.shape:
                    tensor.detach().copy_(old)
        if self.names and self.started and not self.fits and isinstance(error, CheckpointError):
            error.changed = self.names
            error.args = (f"{error.args[0]} The model's tensors were partly overwritten (.changed names them).",)


def _lazy(tensor: torch.Tensor) -> bool:
    return bool(nn.parameter.is_lazy(tensor))


def _call(loader: OwnLoader, work: Work) -> None:
    """Call a module's own loading with real tensors."""
    state: OrderedDict[str, Any] = OrderedDict((n, read_tensor(i)) for n, i in loader.given.items())
    for module, name, value in work.extras:
        if any(module is inner for inner in loader.module.modules()):
            state[name] = _extra(value, name)
    _give_memory(loader.module)
    missing: list[str] = []
    unexpected: list[str] = []
    prefix = loader.live + "." if loader.live else ""
    metadata = {p: {"version": v} for p, v in work.match.source.versions.items()}
    own = type(loader.module).load_state_dict is not nn.Module.load_state_dict
    try:
        if own and not prefix:
            state._metadata = metadata  # type: ignore[attr-defined]
            loader.module.load_state_dict(state)
            errors: list[str] = []
        else:
            errors = run_own_loading(loader.module, prefix, state, metadata, missing, unexpected)
    except Exception as error:
        raise MismatchError(
            f"{loader.name or type(loader.module).__name__} loads itself and refused: {error}",
            plan=work.plan,
            path=work.plan.path,
        ) from error
    problems = [*errors, *(f"missing {n}" for n in missing), *(f"unexpected {n}" for n in unexpected)]
    if problems:
        raise MismatchError(
            f"{loader.name or type(loader.module).__name__} loads itself and refused: {'; '.join(problems)}. "
            "The model was not changed.",
            plan=work.plan,
            path=work.plan.path,
        )


def _give_memory(module: nn.Module) -> None:
    if any(t.is_meta and not _lazy(t) for t in (*module.parameters(), *module.buffers())):
        module.to_empty(device="cpu")


def _extra(value: object, name: str) -> Any:
    from anycard.pickles.stubs import Inert
    from anycard.torch.loading import materialise

    if isinstance(value, (Inert, type)):
        raise MismatchError(
            f"{name}: the extra state is an object of {getattr(value, 'path', value)}, which is not rebuilt; "
            "strict=False loads the rest. The model was not changed."
        )
    return materialise(value)


def _set_extra(module: nn.Module, name: str, value: object, strict: bool) -> None:
    """Give a module its extra state back; with strict=False one that is not rebuilt is left out, said."""
    try:
        state = _extra(value, name)
    except MismatchError:
        if strict:
            raise
        warn(f"{name} was left out: its extra state is an object that is not rebuilt")
        return
    module.set_extra_state(state)


def _finish(work: Work, strict: bool) -> None:
    """Counters, extra state, wrapper state, and the modules' own post-hooks."""
    called = {id(m) for loader in work.loaders if loader.trace.computed for m in loader.module.modules()}
    with torch.no_grad():
        for target in work.zeros:
            if target.tensor.is_meta:
                target.module._buffers[target.attribute] = torch.tensor(0, dtype=target.tensor.dtype)
        for target in targets(work.model):
            for setting in work.unset:
                name, _, value = setting.partition("=")
                if target.own and target.attribute == name:
                    target.tensor.fill_(int(value))
    for owner, path, extra in work.extras:
        if id(owner) not in called:
            _set_extra(owner, path, extra, strict)
    for loader in work.loaders:
        for module in loader.module.modules():
            for hook in module._load_state_dict_post_hooks.values():
                hook(module, _IncompatibleKeys([], []))
