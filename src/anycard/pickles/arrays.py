"""numpy's arrays and scalars, as its pickles spell them. What torch has no dtype for stays an inert stub."""

from __future__ import annotations

import math
import re
from typing import Any

from anycard.errors import FormatError
from anycard.pickles.budget import Budget
from anycard.pickles.stubs import Inert
from anycard.pickles.views import Built, ints, sized, view
from anycard.tensors import ARRAY, BY_NUMPY, Storage, TensorInfo, row_major

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.pickles.machine import Machine


class ArrayStub(Built):
    """An array on its way through REDUCE and BUILD."""

    module, name = "numpy", "ndarray"
    budget: Budget

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            self.result = _array(self.budget, shape, dtype, "F" if fortran else "C", data)


class FollowedArray(ArrayStub):
    """joblib's NumpyArrayWrapper: the array's bytes stand in the stream, right after the BUILD of its description.

    Source: joblib/numpy_pickle.py `NumpyArrayWrapper.write_array`.
    """

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def follow(self, machine: Machine) -> None:
        """Take the bytes that follow; what torch has no dtype for is passed over."""
        if machine.budget.embedded is None:
            return
        state = self.state
        if self.result is not None or self.args or type(state) is not dict:
            raise FormatError("an array that joblib does not write so follows here")
        dtype = state.get("dtype")
        size = _itemsize(dtype)
        if size is None:
            raise FormatError("an array of joblib's whose elements have no known size follows here")
        if size == 0:
            self.items = [machine.inner()]
            return
        laid = _laid_out(machine.budget, state.get("shape"), state.get("order"), None)
        if laid is None:
            raise FormatError("an array of joblib's in an unknown order follows here")
        sized(*laid)
        if state.get("numpy_array_alignment_bytes") is not None:
            machine.skip(machine.byte())
        nbytes = math.prod(laid[0]) * size
        element = _element(dtype)
        if element is None:
            machine.skip(nbytes)
            return
        storage = self._storage(machine, nbytes, element[1])
        self.result = view(storage, element[0], 0, *laid)

    def _storage(self, machine: Machine, nbytes: int, big: bool) -> Storage:
        """In the file, where the pickle lies in one."""
        at = machine.pos
        embedded = machine.budget.embedded
        if embedded is None or embedded.source is None:
            return Storage(ARRAY, nbytes, data=machine.take(nbytes), big_endian=big)
        machine.skip(nbytes)
        return Storage(ARRAY, nbytes, source=embedded.source, offset=at, big_endian=big).settle()


def _itemsize(dtype: Any) -> int | None:
    """Bytes of an element of a pickled `numpy.dtype`; 0 where they are objects in a pickle of their own."""
    if not isinstance(dtype, Inert) or (type(dtype).module, type(dtype).name) != ("numpy", "dtype"):
        return None
    code = dtype.args[0] if dtype.called and dtype.args else None
    if type(code) is not str or not re.fullmatch(r"[a-zA-Z][0-9]{1,9}", code):
        return None
    size = int(code[1:]) * (4 if code[0] == "U" else 1)
    parts = (-1, -1, 0) if dtype.state is None else dtype.state[5:8] if type(dtype.state) is tuple else ()
    if len(parts) < 3 or any(type(part) is not int for part in parts):
        return None  # whatever a loader takes it for
    told, _, flags = parts
    if code[0] == "O" or flags & 1:
        return 0
    return size if told in (-1, size) else None


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
    """numpy.core.multiarray.scalar: a plain number or text."""
    text = _text(budget, dtype, data)
    if text is not None:
        return text
    info = _array(budget, (), dtype, "C", data)
    if info is None or info.storage.data is None:
        return NotImplemented
    import numpy as np

    code = dtype.args[0]
    order = ">" if info.storage.big_endian else "<"
    held = info.storage.data[0 : info.nbytes]
    return np.frombuffer(held, dtype=code if code[1:] == "1" else order + code)[0].item()


def _text(budget: Budget, dtype: Any, data: Any) -> str | None:
    """What a `numpy.str_` is; None for anything else."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if not isinstance(code, str) or not re.fullmatch(r"U[0-9]{1,9}", code) or not isinstance(data, bytes):
        return None
    budget.spend(len(data))
    return data.decode("utf-32-be" if _order(dtype) == ">" else "utf-32-le", "surrogatepass").rstrip("\0")


def _array(budget: Budget, shape: Any, dtype: Any, order: Any, data: Any, axes: Any = None) -> TensorInfo | None:
    element = _element(dtype)
    held = _held(budget, data)
    if element is None or held is None or not isinstance(shape, tuple):
        return None
    name, big = element
    laid = _laid_out(budget, shape, order, axes)
    if laid is None:
        return None
    sizes, stride = laid
    storage: Storage
    if budget.embedded is not None:
        storage = budget.embedded.storage(ARRAY, held, big_endian=big)
    else:
        storage = Storage(ARRAY, len(held), data=held, big_endian=big)
    return view(storage, name, 0, sizes, stride)


def _laid_out(budget: Budget, shape: Any, order: Any, axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides for numpy's order of elements."""
    sizes = ints(budget, shape, "shape")
    if order == "F":
        return sizes, row_major(sizes[::-1])[::-1]
    if order == "C" or (order == "K" and axes is None):
        return sizes, row_major(sizes)
    if order == "K" and sorted(ints(budget, axes, "order of axes")) == list(range(len(sizes))):
        steps = row_major(sizes)
        return tuple(sizes[axis] for axis in axes), tuple(steps[axis] for axis in axes)
    return None


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
    return None if row is None else (row.name, _order(dtype) == ">")


def _order(dtype: Inert) -> Any:
    state = dtype.state
    return state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
