"""A file's content as an indented tree; a pickled module as `print(model)` would show it, without its class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anycard.names.mappings import entries, items
from anycard.names.pickled_modules import COMMON, children_of, class_name, is_module, module_state, own_tensors
from anycard.pickles.stubs import Inert
from anycard.tensors import TensorInfo

_DEEPEST = 200
_MOST = 100_000  # lines: a small file can hold one part a million times
_LONG = 256  # characters of a name
_SHOWN = 120  # and of a value
_PLAIN = (bool, int, float, str, type(None))


def tree_lines(obj: Any) -> Iterator[str]:
    """The lines of the tree, at most 100,000."""
    for count, line in enumerate(_lines(obj, "", 0, frozenset())):
        if count >= _MOST:
            yield "…"
            return
        yield line


def _lines(obj: Any, label: str, depth: int, above: frozenset[int]) -> Iterator[str]:
    pad = "  " * depth
    if id(obj) in above or depth > _DEEPEST:
        yield f"{pad}{label}…"
        return
    above |= {id(obj)}
    if isinstance(obj, Inert) and is_module(obj):
        yield from _module(obj, label, depth, above)
    elif isinstance(obj, TensorInfo):
        yield f"{pad}{label}{_sized(obj)}"
    elif isinstance(obj, Mapping) and obj:
        yield f"{pad}{label.rstrip(' ')}" if label else f"{pad}{len(obj)} entries"
        for name, value in entries(obj):
            yield from _lines(value, f"{name[:_LONG]}: ", depth + 1, above)
    elif isinstance(obj, (list, tuple)) and any(not isinstance(v, _PLAIN) for v in obj):
        yield f"{pad}{label.rstrip(' ')}"
        for index, value in enumerate(obj):
            yield from _lines(value, f"{index}: ", depth + 1, above)
    else:
        yield f"{pad}{label}{_short(obj)}"


def _module(obj: Inert, label: str, depth: int, above: frozenset[int]) -> Iterator[str]:
    pad = "  " * depth
    state = module_state(obj) or {}
    children = children_of(obj)
    head = f"{pad}{label}{class_name(obj) or 'call'}({_attributes(state)}"
    own = [] if children else list(own_tensors(obj, everything=True))
    if not children and not (own and not _attributes(state)):
        yield head + ")"
        return
    yield head
    for name, child in children.items():
        yield from _lines(child, f"({name[:_LONG]}): ", depth + 1, above)
    for name, info in own:
        yield f"{pad}  {name[:_LONG]}: {_sized(info)}"
    yield pad + ")"


def _attributes(state: Mapping[str, Any]) -> str:
    """What looks like an argument of the constructor: public, plain."""
    shown = []
    for name, value in items(state):
        plain = isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and _flat(value))
        if plain and not name.startswith("_") and name not in COMMON:
            shown.append(f"{name[:_LONG]}={_short(value)}")
    return ", ".join(shown)


def _sized(info: TensorInfo) -> str:
    return f"{info.dtype} {' x '.join(map(str, info.shape)) or 'scalar'}"


def _short(value: Any) -> str:
    if isinstance(value, Inert):
        return f"<{value.path}>"
    if isinstance(value, type):
        return f"<{getattr(value, 'module', '?')}.{getattr(value, 'name', '?')}>"
    if isinstance(value, (str, bytes)):
        text = repr(value[:_SHOWN])
    elif isinstance(value, (*_PLAIN, complex)) or _flat(value):
        text = repr(value)
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "…"


def _flat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple, dict, set, frozenset))
        and len(value) <= 16
        and all(isinstance(v, _PLAIN) and (not isinstance(v, str) or len(v) <= _LONG) for v in value)
    )
