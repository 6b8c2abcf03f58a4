"""The content of a dict of objects as what the pickler writes: tensors, plain data, torch's own small types."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from anycard.errors import CheckpointError
from anycard.names.paths import join
from anycard.pickles.writer import COUNTER, GlobalRef, Reduced
from anycard.torch.state import state_of
from anycard.torch.storages import Storages

_PLAIN = (bool, int, float, str, bytes, bytearray, complex)
_VALUES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)  # of an object of a subclass: its value, whatever the class makes of `str(it)`
_DEEPEST = 200  # levels of containers; a dict that holds itself has no end


def plain_data(value: Any, storages: Storages, mark: dict[str, Any], name: str = "", depth: int = 0) -> Any:
    """The value as what the pickler writes.

    Args:
        mark: Gets what belongs to wrappers.
        name: The value's path, for errors.

    Raises:
        CheckpointError: Anything that is no plain data; names it.
    """
    if depth > _DEEPEST:
        raise CheckpointError(f"{name[:200]} is nested deeper than {_DEEPEST} levels: does it hold itself?", name=name)
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return storages.ref(value, name or "the tensor")
    if isinstance(value, nn.Module):
        state, wrappers = state_of(value)
        if wrappers:
            mark.setdefault("wrappers", {}).update({join(name, own): count for own, count in wrappers.items()})
        return plain_data(state, storages, mark, name, depth)
    if isinstance(value, Mapping):
        return _mapping(value, storages, mark, name, depth)
    if isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, torch.Size):
        items = [plain_data(v, storages, mark, join(name, i), depth + 1) for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items) if isinstance(value, tuple) else _set(items, name)
    return _small(value, storages, mark, name, depth)


def _mapping(value: Mapping[Any, Any], storages: Storages, mark: dict[str, Any], name: str, depth: int) -> Any:
    items = ((_key(k, name), plain_data(v, storages, mark, join(name, k), depth + 1)) for k, v in value.items())
    if isinstance(value, Counter):
        return Reduced(COUNTER, (dict(items),))
    if not isinstance(value, OrderedDict):
        return dict(items)
    held: OrderedDict[Any, Any] = OrderedDict(items)
    metadata = getattr(value, "_metadata", None)
    if isinstance(metadata, Mapping):
        held._metadata = OrderedDict((k, dict(v)) for k, v in metadata.items())  # type: ignore[attr-defined]
    return held


def _set(items: list[Any], name: str) -> set[Any]:
    """A set, for a frozenset too: plain PyTorch's reader of weights knows no other."""
    try:
        return set(items)
    except TypeError:
        message = f"{name or 'the set'} is a set that holds sets or dicts, which plain PyTorch's reader does not take"
        raise CheckpointError(message, name=name) from None


def _key(key: Any, name: str) -> Any:
    """A key that the reader of plain weights takes."""
    if key is None or type(key) in _PLAIN:
        return key
    if type(key) in (tuple, torch.Size):
        return tuple(_key(part, name) for part in key)
    if isinstance(key, torch.dtype):
        return GlobalRef("torch", str(key).removeprefix("torch."))
    if type(key).__module__ == "numpy" and hasattr(key, "item") and type(key.item()) in _PLAIN:
        return key.item()
    if (plain := _by_value(key)) is not None:
        return plain
    kind = f"{type(key).__module__}.{type(key).__qualname__}"
    message = f"{name or 'the dict'} has the key {key!r:.80}, a {kind}: only text, numbers and tuples of them are saved"
    raise CheckpointError(message, name=name)


def _small(value: Any, storages: Storages, mark: dict[str, Any], name: str, depth: int) -> Any:
    if isinstance(value, torch.Size):
        return Reduced(GlobalRef("torch", "Size"), (tuple(value),))
    if isinstance(value, torch.dtype):
        return GlobalRef("torch", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        args = (value.type,) if value.index is None else (value.type, value.index)
        return Reduced(GlobalRef("torch", "device"), args)
    if type(value).__module__ == "numpy":
        return _of_numpy(value, storages, name)
    if (plain := _by_value(value)) is not None:
        return plain
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        return plain_data(value.state_dict(), storages, mark, name, depth)
    raise _refused(value, name)


def _by_value(value: Any) -> Any:
    """The text or number that an object of a subclass is (`torch.__version__`, an IntEnum's member), else None."""
    return next((plain(value) for kind, plain in _VALUES if isinstance(value, kind)), None)


def _of_numpy(value: Any, storages: Storages, name: str) -> Any:
    """A scalar as a plain number, an array as a tensor."""
    import numpy as np

    if isinstance(value, np.generic) and type(value.item()) in _PLAIN:
        return value.item()
    if isinstance(value, np.ndarray):
        try:
            held = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="K"))
        except TypeError:
            raise CheckpointError(f"{name} is a numpy array of {value.dtype}, which torch lacks", name=name) from None
        return storages.ref(held, name)
    raise _refused(value, name)


def _refused(value: Any, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name or 'the object'} is a {type(value).__module__}.{type(value).__qualname__}: only tensors, plain data "
        "and objects with state_dict are saved (for a Namespace or dataclass, save vars(it))",
        name=name,
    )
