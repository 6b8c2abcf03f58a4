"""A pickle's memo, of which stretches may be made when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any


class Memo(dict[int, Any]):
    """Place -> value."""

    def __init__(self) -> None:
        super().__init__()
        self._firsts: list[int] = []
        self._promises: list[tuple[int, Callable[[int], Mapping[int, Any]]]] = []

    def is_new(self, places: range) -> bool:
        """Nothing has been put into these places; told in no more steps than there are places."""
        if self._promises and self._promises[-1][0] > places.start:
            return False
        if len(self) < len(places):
            return max(self, default=-1) < places.start
        return self.keys().isdisjoint(places)

    def promise(self, places: range, make: Callable[[int], Mapping[int, Any]]) -> None:
        """Fill new places when they are asked for: `make` gives one's value, and maybe others'."""
        self._firsts.append(places.start)
        self._promises.append((places.stop, make))

    def __missing__(self, index: int) -> Any:
        at = bisect_right(self._firsts, index) - 1
        if at < 0 or index >= self._promises[at][0]:
            raise KeyError(index)
        for place, value in self._promises[at][1](index).items():
            self.setdefault(place, value)  # what has been put there since stays
        return self[index]

    def count(self) -> int:
        """How many places hold a value."""
        for first, (end, _) in zip(self._firsts, self._promises, strict=True):
            for index in range(first, end):
                self[index]
        self._firsts.clear()
        self._promises.clear()
        return len(self)
