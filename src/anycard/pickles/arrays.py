"""numpy's arrays and scalars, as its pickles spell them. What torch has no dtype for stays an inert stub."""

from __future__ import annotations

from typing import Any

from anycard.pickles.budget import Budget
from anycard.pickles.stubs import Inert
from anycard.pickles.views import ints, view
from anycard.tensors import ARRAY, BY_NUMPY, Storage, TensorInfo, row_major


class ArrayStub(Inert):
    """An array on its way through REDUCE and BUILD.

    Attributes:
        result: The tensor, once it is known.
    """

    module, name = "numpy", "ndarray"
    budget: Budget
    result: TensorInfo | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            self.result = _array(self.budget, shape, dtype, "F" if fortran else "C", data)


def reconstruct(budget: Budget, *args: Any) -> ArrayStub:
    """numpy.core.multiarray._reconstruct: an empty array, whose BUILD brings shape, dtype and bytes."""
    stub: ArrayStub = ArrayStub(*args)
    stub.budget = budget
    return stub


def from_buffer(budget: Budget, data: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> Any:
    """numpy.core.numeric._frombuffer, as pickle protocol 5 spells arrays."""
    info = _array(budget, shape, dtype, order, data, axes)
    return NotImplemented if info is None else info


def scalar(budget: Budget, dtype: Any, data: Any = b"") -> Any:
    """numpy.core.multiarray.scalar: a plain number."""
    info = _array(budget, (), dtype, "C", data)
    if info is None or info.storage.data is None:
        return NotImplemented
    import numpy as np

    code = dtype.args[0]
    order = ">" if info.storage.big_endian else "<"
    held = info.storage.data[0 : info.nbytes]
    return np.frombuffer(held, dtype=code if code[1:] == "1" else order + code)[0].item()


def _array(budget: Budget, shape: Any, dtype: Any, order: Any, data: Any, axes: Any = None) -> TensorInfo | None:
    element = _element(dtype)
    held = _held(budget, data)
    if element is None or held is None or not isinstance(shape, tuple):
        return None
    name, big = element
    sizes = ints(budget, shape, "shape")
    if order == "F":
        stride = row_major(sizes[::-1])[::-1]
    elif order == "C" or (order == "K" and axes is None):
        stride = row_major(sizes)
    elif order == "K" and sorted(ints(budget, axes, "order of axes")) == list(range(len(sizes))):
        steps = row_major(sizes)
        sizes, stride = tuple(sizes[axis] for axis in axes), tuple(steps[axis] for axis in axes)
    else:
        return None
    return view(Storage(ARRAY, len(held), data=held, big_endian=big), name, 0, sizes, stride)


def _held(budget: Budget, data: Any) -> bytes | bytearray | None:
    """An array's bytes; Python 2 wrote them as text, which `text_of` made so that they can be had back."""
    if isinstance(data, str):
        budget.spend(len(data))
        return bytes_of(data)
    return data if isinstance(data, (bytes, bytearray)) else None


def text_of(data: bytes) -> str:
    """Python 2's byte string as text: UTF-8 as torch.load takes it; other bytes stay apart, none is lost."""
    return data.decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    """The byte string that `text_of` was given."""
    return text.encode("utf-8", "surrogateescape")


def _element(dtype: Any) -> tuple[str, bool] | None:
    """torch's dtype for a pickled `numpy.dtype`, and whether it is big-endian; None where torch has none."""
    if not isinstance(dtype, Inert) or (type(dtype).module, type(dtype).name) != ("numpy", "dtype"):
        return None
    code = dtype.args[0] if dtype.args else None
    row = BY_NUMPY.get(code) if isinstance(code, str) else None
    state = dtype.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    return None if row is None else (row.name, order == ">")
