"""Inert stand-ins for every class and function that a pickle names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar


class Inert:
    """An object of a class that is not run: it keeps what the pickle gave it, and does nothing.

    A subclass stands for one global; referenced as data, the subclass itself is the reference.

    Attributes:
        module, name: The global that the class stands for.
        make: What a call gives where the global is known; NotImplemented from it gives a stub all the same.
        args, kwargs: Arguments that it was made with.
        state: What BUILD gave, or None.
        items, pairs: What APPENDS and SETITEMS gave.
        called: Made by a call (REDUCE), rather than by `__new__`.
        callee: What was called: its class, or another stub.
        known: What was found out about it, once it was read; so that a stub that many hold is looked at once.
    """

    module: ClassVar[str] = ""
    name: ClassVar[str] = ""
    make: ClassVar[Callable[..., Any] | None] = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    state: Any = None
    items: Sequence[Any] = ()
    pairs: Sequence[tuple[Any, Any]] = ()
    called: bool = False
    callee: Any = None
    known: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Any:
        if cls.make is not None:
            made = cls.make(*args, **kwargs)
            if made is not NotImplemented:
                return made
        self = object.__new__(cls)
        if args:
            self.args = args
        if kwargs:
            self.kwargs = kwargs
        return self

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self.called = True

    def __init_subclass__(cls) -> None:
        cls.callee = cls

    def __call__(self, /, *args: Any, **kwargs: Any) -> Inert:
        made: Inert = Inert(*args, **kwargs)
        made.callee = self
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def extend(self, items: Any) -> None:
        if not isinstance(self.items, list):
            self.items = []
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self.pairs, list):
            self.pairs = []
        self.pairs.append((key, value))

    @property
    def attributes(self) -> Mapping[Any, Any] | None:
        """The state by name: a dict, or as pickle spells slots, (dict or None, dict); None where it is neither."""
        state = self.state
        if type(state) is tuple and len(state) == 2 and isinstance(state[1], Mapping):
            outer = {} if state[0] is None else state[0]
            if isinstance(outer, Mapping) and not outer.keys() & state[1].keys():
                return {**outer, **state[1]}
        return state if isinstance(state, Mapping) else None

    @property
    def path(self) -> str:
        """`module.name` of its class."""
        return f"{type(self).module}.{type(self).name}" if type(self).name else "(what a call made)"

    def __repr__(self) -> str:
        return f"<inert {self.path}>"


class Size(tuple[Any, ...]):
    """A `torch.Size`: a plain tuple for all that reads it, told apart where a whole model is rebuilt."""


class Counted(dict[Any, Any]):
    """A `collections.Counter`, as a plain dict."""


class Defaulting(dict[Any, Any]):
    """A `collections.defaultdict`, as a plain dict.

    Attributes:
        factory: What stands for its factory: an inert class, or None.
    """

    factory: Any = None


def inert_class(module: str, name: str, base: type[Inert] = Inert, **attributes: Any) -> type[Inert]:
    """A new class that stands for the global `module.name`."""
    return type(name.rpartition(".")[2] or "Inert", (base,), {"module": module, "name": name, **attributes})
