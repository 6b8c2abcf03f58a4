"""Modules that load themselves: which they are, and a trace of what they would do with stored tensors.

While a module is traced, its parameters and buffers stand aside for meta shadows; placeholders of the
stored tensors go through its own `_load_from_state_dict` and hooks, and each `copy_` of a placeholder
into a shadow tells which stored tensor goes where.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.overrides import TorchFunctionMode

from anycard.names.paths import join
from anycard.tensors import TensorInfo
from anycard.torch.attributes import Attributes
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.modules import live_wrapper
from anycard.torch.overrides import METADATA, short_name
from anycard.torch.seeding import forked

# What gives the same elements again, in the same order; and the same in another shape.
_SAME = frozenset(("detach", "clone", "contiguous", "cpu", "to", "data", "requires_grad_", "type", "float", "half"))
_RESHAPED = frozenset(("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"))


def counts_batches(module: nn.Module) -> bool:
    """A batch norm whose counter old files may lack."""
    return isinstance(module, _NormBase) and module.track_running_stats


def overrides_entry(module: nn.Module) -> bool:
    """It has a `load_state_dict` of its own, which plain PyTorch calls on the outermost module only."""
    if "load_state_dict" in vars(module):
        return True
    return type(module).load_state_dict is not nn.Module.load_state_dict and live_wrapper(module) is None


@dataclass
class Trace:
    """What a module did with the placeholders.

    Attributes:
        copies: Name in the model -> name given, of tensors whose elements went over unchanged.
        missing, unexpected, errors: As the module itself reports.
        computed: It computed something, or could not be traced: it has to be called for real.
        reported: It went through to its end, so `missing` and `unexpected` can be relied on.
    """

    copies: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    computed: bool = False
    reported: bool = False


def named_in(error: str, name: str) -> bool:
    """What a module says names the tensor."""
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", error) is not None


class _Watch(TorchFunctionMode):
    """Follows placeholders to the shadows that they are copied into.

    Whatever is written to a placeholder, or to anything that has its memory, shows in the versions that torch counts.
    """

    def __init__(self, given: Mapping[str, torch.Tensor], shadows: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.given: dict[int, str] = {}
        self.shadows: dict[int, list[str]] = {}
        for name, tensor in shadows.items():
            self.shadows.setdefault(id(tensor), []).append(name)
        self.trace = Trace()
        self._aliases: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in given}
        for name, tensor in given.items():
            self._stands_for(tensor, name)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = short_name(func)
        try:
            result = func(*args, **(kwargs or {}))
        except BaseException:
            self.trace.computed = True  # on real tensors it might not have failed, whatever the module makes of it
            raise
        if name == "copy_" and id(args[0]) in self.shadows and isinstance(args[1], torch.Tensor):
            self._copied(args[0], args[1])
        elif args and id(args[0]) in self.given:
            if getattr(func, "__name__", "") == "__set__" and name not in METADATA:
                self.trace.computed = True  # it is given other memory
            self._follow(name, args[0], result)
        elif name not in METADATA and any(id(value) in self.shadows for value in (*args, *(kwargs or {}).values())):
            self.trace.computed = True  # a shadow was used for more than a look at its shape
        return result

    def _stands_for(self, tensor: torch.Tensor, stored: str) -> None:
        self.given[id(tensor)] = stored
        self._aliases[stored].append((tensor, tensor._version))

    def _stored(self, tensor: torch.Tensor) -> str | None:
        """The stored tensor that this one stands for; None for any other, and once an alias was written to."""
        stored = self.given.get(id(tensor))
        untouched = stored is not None and all(alias._version == version for alias, version in self._aliases[stored])
        return stored if untouched else None

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        stored = self._stored(source)
        if stored is None or target.shape != source.shape:
            self.trace.computed = True
        else:
            tied = self.shadows[id(target)]
            self.trace.copies.update(dict.fromkeys([stored] if stored in tied else tied, stored))

    def _follow(self, name: str, source: torch.Tensor, result: Any) -> None:
        """The result stands for the same stored tensor, where it has the same elements in the same order."""
        if not isinstance(result, torch.Tensor) or result.dtype != source.dtype or id(result) in self.given:
            return
        same = name in _SAME and result.shape == source.shape
        reshaped = name in _RESHAPED or (name == "__getitem__" and source.numel() == 1)
        stored = self._stored(source)
        if stored is not None and (same or (reshaped and source.numel() == result.numel())):
            self._stands_for(result, stored)


def trace(
    module: nn.Module, prefix: str, given: Mapping[str, TensorInfo], metadata: Mapping[str, dict[str, Any]]
) -> Trace:
    """Run the module's own loading on placeholders.

    Args:
        module: The topmost self-loading module; all below it is traced too.
        prefix: Its name in the given names ("" or ending in a dot).
        given: Names (with the prefix) -> stored tensors.
        metadata: Module paths in the given names -> what `_metadata` says of them (`{"version": 2}`).
    """
    inference = torch.inference_mode(mode=False)  # its tensors count no versions
    fork = forked()  # modules that build others on load draw random numbers
    with inference, fork, _shadows(module, prefix) as (shadows, kept), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: OrderedDict[str, Any] = OrderedDict()
        for name, info in given.items():
            if name.rpartition(".")[2] != "_extra_state":
                state[name] = torch.empty(info.shape, dtype=TO_TORCH[info.dtype], device="meta")
        grads = [(shadow, shadow.requires_grad) for shadow in shadows.values()]
        watch = _Watch(state, shadows)
        found = watch.trace
        try:
            with watch:
                found.errors += run_own_loading(module, prefix, state, metadata, found.missing, found.unexpected)
            found.reported = True
        except Exception:  # noqa: BLE001 - whatever a model's own code raises on meta tensors
            found.computed = True
        if kept.changed() or any(_marked(shadow, grad) for shadow, grad in grads):
            found.computed = True
    return found


def _marked(shadow: torch.Tensor, requires_grad: bool) -> bool:
    """Something else than values was given to a tensor."""
    hooks = shadow._backward_hooks or getattr(shadow, "_post_accumulate_grad_hooks", None)
    return bool(shadow.requires_grad is not requires_grad or vars(shadow) or hooks)


def run_own_loading(
    module: nn.Module,
    prefix: str,
    state: Mapping[str, Any],
    metadata: Mapping[str, dict[str, Any]],
    missing: list[str],
    unexpected: list[str],
    *,
    hooks: bool = False,
) -> list[str]:
    """What `load_state_dict` does below its entry; gives the error messages.

    Args:
        hooks: Run the post-hooks. Without, they run where something is missing or unexpected, because they may say
            that this is as it should be.
    """
    errors: list[str] = []

    def visit(at: nn.Module, local: OrderedDict[str, Any], path: str) -> None:
        local._metadata = metadata  # type: ignore[attr-defined]
        own = dict(metadata.get(path[:-1], {}))
        at._load_from_state_dict(local, path, own, True, missing, unexpected, errors)
        for name, child in at._modules.items():
            if child is not None:
                below = path + name + "."
                visit(child, OrderedDict((k, v) for k, v in local.items() if k.startswith(below)), below)
        if hooks or missing or unexpected:
            for hook in at._load_state_dict_post_hooks.values():
                hook(at, _IncompatibleKeys(missing, unexpected))

    visit(module, OrderedDict(state), prefix)
    return errors


@contextmanager
def _shadows(module: nn.Module, prefix: str) -> Iterator[tuple[dict[str, torch.Tensor], Attributes]]:
    """Put meta tensors in the place of all parameters and buffers; put the real ones, and all else, back after.

    Gives the shadows by name, and the modules as they are with these.
    """
    before = Attributes(module.modules())
    made: dict[int, torch.Tensor] = {}
    names: dict[str, torch.Tensor] = {}
    stood: list[tuple[Any, str, torch.Tensor]] = []  # a scripted module's are no dicts
    try:
        for path, inner in module.named_modules(prefix=prefix.rstrip("."), remove_duplicate=False):
            for held in (inner._parameters, inner._buffers):
                for name, tensor in list(held.items()):
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        stood.append((held, name, tensor))
                        shadow = _shadow(tensor)
                        made[id(tensor)] = made[id(shadow)] = shadow  # a module may be met twice
                    held[name] = names[join(path, name)] = made[id(tensor)]
        yield names, Attributes(module.modules())
    finally:
        for held, name, tensor in stood:
            held[name] = tensor
        before.put_back()


def _shadow(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):
        kind: Any = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        return kind(requires_grad=tensor.requires_grad, device="meta", dtype=tensor.dtype)  # type: ignore[no-any-return]
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
