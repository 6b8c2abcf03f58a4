"""`diff`: names, shapes, dtypes and values of two checkpoints, across formats and wrappers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from anycard.arguments import refuse_odd
from anycard.checkpoint import open_checkpoint, tensor_bytes

Path = str | os.PathLike[str] | BinaryIO


@dataclass(frozen=True)
class Difference:
    """What `diff` found; all empty where the weights are the same.

    Attributes:
        only_a, only_b: Canonical names that one file has.
        shapes, dtypes: Name -> (in a, in b).
        values: Names whose bits differ.
        same: How many tensors are the same bit for bit.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: dict[str, tuple[str, str]]
    values: tuple[str, ...]
    same: int

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not (self.only_a or self.only_b or self.shapes or self.dtypes or self.values)


def diff(a: Path, b: Path, *, key: str | None = None, member: str | None = None) -> Difference:
    """Compare the weights of two files; `key` and `member` mean both.

    Raises:
        FormatError: One is damaged, or no checkpoint.
        ChoiceError: One holds several state dicts, and no `key` was given.
    """
    refuse_odd(key=key, member=member)
    with open_checkpoint(a, member=member) as first, open_checkpoint(b, member=member) as second:
        left, right = first.weights(key), second.weights(key)
        common = [name for name in left if name in right]
        shapes = {n: (left[n].shape, right[n].shape) for n in common if left[n].shape != right[n].shape}
        dtypes = {n: (left[n].dtype, right[n].dtype) for n in common if left[n].dtype != right[n].dtype}
        alike = [n for n in common if n not in shapes and n not in dtypes]
        values = tuple(n for n in alike if tensor_bytes(left[n]) != tensor_bytes(right[n]))
        return Difference(
            tuple(n for n in left if n not in right),
            tuple(n for n in right if n not in left),
            shapes,
            dtypes,
            values,
            len(alike) - len(values),
        )
