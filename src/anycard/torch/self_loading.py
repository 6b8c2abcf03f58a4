"""Modules that load themselves: which they are, and a trace of what they would do with stored tensors.

While a module is traced, its parameters and buffers stand aside for meta shadows; placeholders of the
stored tensors go through its own `_load_from_state_dict` and hooks, and each `copy_` of a placeholder
into a shadow tells which stored tensor goes where.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from anycard.tensors import TensorInfo
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.modules import live_wrapper

# Overrides that we have read: batch norms' counter may be missing below version 2.
KNOWN = frozenset({nn.Module._load_from_state_dict, _NormBase._load_from_state_dict})


def counts_batches(module: nn.Module) -> bool:
    """A batch norm whose counter old files may lack."""
    return isinstance(module, _NormBase) and module.track_running_stats


def loads_itself(module: nn.Module) -> bool:
    """The module does more on load than copy tensors by name."""
    kind = type(module)
    if live_wrapper(module) is not None:
        return False
    if kind._load_from_state_dict not in KNOWN or kind.load_state_dict is not nn.Module.load_state_dict:
        return True
    if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return True
    if kind.set_extra_state is not nn.Module.set_extra_state:
        return True
    held = (*module._parameters.values(), *module._buffers.values())
    return any(is_lazy(t) for t in held if t is not None)


@dataclass
class Trace:
    """What a module did with the placeholders.

    Attributes:
        copies: Name in the model -> name given, of tensors that went over unchanged.
        missing, unexpected: As the module itself reports.
        computed: It computed something, or could not be traced: it has to be called for real.
    """

    copies: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    computed: bool = False


class _Watch(TorchFunctionMode):
    """Follows placeholders to the shadows that they are copied into."""

    def __init__(self, given: dict[int, str], shadows: dict[int, str]) -> None:
        super().__init__()
        self.given = given
        self.shadows = shadows
        self.trace = Trace()
        self.keep: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        if name == "copy_" and id(args[0]) in self.shadows:
            source = self.given.get(id(args[1]))
            if source is None:
                self.trace.computed = True
            else:
                self.trace.copies[self.shadows[id(args[0])]] = source
        elif args and isinstance(args[0], torch.Tensor) and id(args[0]) in self.given:
            self._follow(name, args[0], result)
        return result

    def _follow(self, name: str, source: torch.Tensor, result: Any) -> None:
        same = name in ("detach", "clone", "contiguous", "to", "cpu", "__get__", "view", "reshape", "__getitem__")
        if same and isinstance(result, torch.Tensor) and result.numel() == source.numel():
            self.given[id(result)] = self.given[id(source)]
            self.keep.append(result)


def trace(module: nn.Module, prefix: str, given: Mapping[str, TensorInfo], versions: Mapping[str, int]) -> Trace:
    """Run the module's own loading on placeholders.

    Args:
        module: The topmost self-loading module; all below it is traced too.
        prefix: Its name in the given names ("" or ending in a dot).
        given: Names (with the prefix) -> stored tensors.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    for name, info in given.items():
        state[name] = torch.empty(info.shape, dtype=TO_TORCH[info.dtype], device="meta")
    metadata = {path: {"version": version} for path, version in versions.items()}
    with _shadows(module, prefix) as shadows, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch = _Watch({id(t): name for name, t in state.items()}, {id(t): n for n, t in shadows.items()})
        watch.keep.extend(state.values())
        try:
            with watch:
                run_own_loading(module, prefix, state, metadata, watch.trace.missing, watch.trace.unexpected)
        except Exception:  # noqa: BLE001 - whatever a model's own code raises on meta tensors
            watch.trace.computed = True
        if {n: id(t) for n, t in _held(module, prefix)} != {n: id(t) for n, t in shadows.items()}:
            watch.trace.computed = True
    return watch.trace


def run_own_loading(
    module: nn.Module,
    prefix: str,
    state: OrderedDict[str, Any],
    metadata: Mapping[str, dict[str, Any]],
    missing: list[str],
    unexpected: list[str],
) -> list[str]:
    """What `load_state_dict` does below its entry, without its post-hooks; gives the error messages."""
    errors: list[str] = []
    state = OrderedDict(state)
    state._metadata = metadata  # type: ignore[attr-defined]

    def visit(at: nn.Module, local: OrderedDict[str, Any], path: str) -> None:
        at._load_from_state_dict(local, path, metadata.get(path[:-1], {}), True, missing, unexpected, errors)
        for name, child in at._modules.items():
            if child is not None:
                below = path + name + "."
                visit(child, OrderedDict((k, v) for k, v in local.items() if k.startswith(below)), below)

    visit(module, state, prefix)
    return errors


def _held(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path, inner in module.named_modules(prefix=prefix.rstrip("."), remove_duplicate=False):
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor


@contextmanager
def _shadows(module: nn.Module, prefix: str) -> Iterator[dict[str, torch.Tensor]]:
    """Put meta tensors in the place of all parameters and buffers; put the real ones back after."""
    made: dict[int, torch.Tensor] = {}
    names: dict[str, torch.Tensor] = {}
    kept = []
    try:
        for path, inner in module.named_modules(prefix=prefix.rstrip("."), remove_duplicate=False):
            kept.append((inner, dict(inner._parameters), dict(inner._buffers)))
            for held in (inner._parameters, inner._buffers):
                for name, tensor in list(held.items()):
                    if tensor is None or is_lazy(tensor):
                        continue
                    held[name] = made.setdefault(id(tensor), _shadow(tensor))
                    names[f"{path}.{name}" if path else name] = held[name]
        yield names
    finally:
        for inner, parameters, buffers in reversed(kept):
            inner._parameters.clear()
            inner._parameters.update(parameters)
            inner._buffers.clear()
            inner._buffers.update(buffers)


def _shadow(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
