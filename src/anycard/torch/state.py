"""A live model's state dict under canonical names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from anycard.errors import CheckpointError
from anycard.names.paths import join, translated
from anycard.names.wrappers import Wrapper
from anycard.torch.modules import Walked, canonical_paths, live_wrapper, refuse_assigned_state_dict, walk


def state_of(model: nn.Module) -> tuple[OrderedDict[str, Any], dict[str, Any]]:
    """A model's real state dict under canonical names, and the state that belongs to its wrappers."""
    walked = walk(model)
    refuse_assigned_state_dict(walked, walked)
    asked, wrappers = _out_of_wrappers(model)
    walked = walk(asked)
    paths = canonical_paths(walked)
    with _real_methods(model):
        live = asked.state_dict()
    own = _wrapper_names(walked)
    state: OrderedDict[str, Any] = OrderedDict()
    for name, value in live.items():
        if name in own:
            wrappers[own[name]] = int(value)
            continue
        canonical = translated(name, paths)
        if canonical in state:
            raise CheckpointError(f"two tensors would both be called {canonical!r}", name=canonical)
        state[canonical] = value
    metadata = getattr(live, "_metadata", None)
    if metadata is not None:
        outer = {path for path, _, module in walked if live_wrapper(module) is not None}  # inside, the versions count
        held = OrderedDict((paths.get(p, p), v) for p, v in metadata.items() if p not in outer)
        state._metadata = held  # type: ignore[attr-defined]
    return state, wrappers


def _out_of_wrappers(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The module to ask for the state dict, and what the wrappers around it have of their own.

    A module takes what its children write, not what their `state_dict` returns: asked through a wrapper, a model
    with a `state_dict` of its own would be bypassed.
    """
    wrappers: dict[str, Any] = {}
    while (row := live_wrapper(model)) is not None:
        inner = model._modules.get(row.child)
        if inner is None or not _says_nothing_more(model, row):
            break
        held = ((name, model._buffers.get(name)) for name in row.own)
        wrappers.update({name: int(value) for name, value in held if value is not None})
        model = inner
    return model, wrappers


_TELLING = ("state_dict", "_save_to_state_dict", "get_extra_state")


def _says_nothing_more(module: nn.Module, row: Wrapper) -> bool:
    """The wrapper's state dict is that of the module in it, but for its names and its known buffers."""
    if any(getattr(type(module), name) is not getattr(nn.Module, name) for name in _TELLING):
        return False
    renaming = getattr(type(module), "_post_state_dict_hook", None)  # activation wrappers hide their segment so
    hooks = {*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()} - {renaming}
    held = {**module._parameters, **module._buffers, **module._modules}
    return not hooks and not held.keys() - {row.child, *row.own}


def _wrapper_names(walked: Walked) -> dict[str, str]:
    """Live name -> canonical name of what belongs to wrappers."""
    found = {}
    for live, canonical, module in walked:
        row = live_wrapper(module)
        for name in row.own if row is not None else ():
            found[join(live, name)] = join(canonical, name)
            found[join(live, name).replace("_checkpoint_wrapped_module.", "")] = join(canonical, name)
    return found


@contextmanager
def _real_methods(model: nn.Module) -> Iterator[None]:
    """Put aside a `state_dict` that was bound onto an instance (an old adapter recipe): all of the model is saved."""
    kept = [(vars(m), vars(m).pop("state_dict")) for m in list(model.modules()) if "state_dict" in vars(m)]
    try:
        yield
    finally:
        for held, method in kept:
            held["state_dict"] = method
