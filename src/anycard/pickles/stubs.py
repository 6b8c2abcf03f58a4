"""Inert stand-ins for every class and function that a pickle names and we do not know."""

from __future__ import annotations

from typing import Any


class Inert:
    """An object of an unknown class: it keeps what the pickle gave it, and does nothing.

    A subclass stands for one global; referenced as data, the subclass itself is the reference.

    Attributes:
        args, kwargs: Arguments that it was made with.
        state: What BUILD gave, or None.
        items, pairs: What APPENDS and SETITEMS gave.
        called: Made by a call (REDUCE), rather than by `__new__`.
    """

    module = ""
    name = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]
    pairs: list[tuple[Any, Any]]
    called: bool
    callee: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.kwargs = args, kwargs
        self.state, self.items, self.pairs = None, [], []
        self.called, self.callee = False, cls
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.called = True

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        made = Inert(*args, **kwargs)
        made.callee = self
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    @property
    def path(self) -> str:
        """`module.name` of its class."""
        return f"{type(self).module}.{type(self).name}"

    def __repr__(self) -> str:
        return f"<inert {self.path}>"


def inert_class(module: str, name: str) -> type[Inert]:
    """A new class that stands for the global `module.name`."""
    return type(name.rpartition(".")[2] or "Inert", (Inert,), {"module": module, "name": name})
