"""What one read may spend: a few bytes of a pickle can ask for the same large work over and over."""

from __future__ import annotations

from typing import Any

from anycard.errors import FormatError
from anycard.limits import Limits
from anycard.pickles.embedded import Embedded

# Types whose hash is cheap and cannot be aimed at: Python seeds that of text and bytes.
_SIMPLE = frozenset([str, bytes, bool, float, type(None)])
_PRIME = (1 << 61) - 1  # an int below hashes to itself
_MOST_PARTS = 1_000
_MOST_ALIKE = 300  # tuples of -1 and -2 do collide


class Budget:
    """What is left of a read's allowance.

    C copies, hashes and compares without a bound, so that is counted here: what a pickle of n bytes
    holds can be copied once, not once a byte. Keys are looked at before they are hashed.

    Attributes:
        limits: The read's limits.
        left: Parts (elements, characters, bytes) that may still be copied or hashed.
        embedded: Whole torch files and raw arrays within the pickle; None where they are not looked for.
    """

    def __init__(self, limits: Limits, nbytes: int) -> None:
        self.limits = limits
        self.left = 100_000 + 2 * nbytes
        self.embedded: Embedded | None = None
        self._odd: dict[int, tuple[object, dict[int, int]]] = {}

    def spend(self, parts: int) -> None:
        """Count work off; FormatError where nothing is left."""
        self.left -= parts
        if self.left < 0:
            raise FormatError("the pickle copies its own data over and over (a bomb?)")

    def key(self, key: Any, target: object) -> None:
        """Refuse a key of `target` that is endless to hash, or one of many with the same hash."""
        kind = type(key)
        if kind in _SIMPLE or (kind is int and -_PRIME < key < _PRIME):
            return
        if isinstance(key, (tuple, frozenset)):  # of a torch.Size as well: its hash is a tuple's
            self.spend(_parts(key))
        elif kind is not int and kind is not complex:
            hash(key)  # by identity, or a TypeError
            return
        alike = self._odd.setdefault(id(target), (target, {}))[1]
        place = hash(key)
        alike[place] = alike.get(place, 0) + 1
        if alike[place] > _MOST_ALIKE:
            raise FormatError(f"more than {_MOST_ALIKE} keys have the same hash (made to collide?)")

    def keep(self, key: Any, target: Any, value: Any = None) -> None:
        """Set a key of a dict, or add a member to a set, where `key` allows it.

        What is there already may lie behind a chain of others, made so, and be looked up again and again.
        """
        self.key(key, target)
        before = len(target)
        if isinstance(target, set):
            target.add(key)
        else:
            target[key] = value
        if len(target) == before:
            self.spend(before // 16)


def _parts(key: Any) -> int:
    """How many parts C's hash visits: shared ones count each time, as it visits them each time."""
    stack, seen = [key], 0
    while stack:
        seen += 1
        if seen + len(stack) > _MOST_PARTS:
            raise FormatError(f"a key has more than {_MOST_PARTS:,} parts")
        held = stack.pop()
        if isinstance(held, (tuple, frozenset)):
            if len(held) > _MOST_PARTS:
                raise FormatError(f"a key has more than {_MOST_PARTS:,} parts")
            stack.extend(held)
    return seen
