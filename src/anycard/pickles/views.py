"""Tensors as a pickle describes them, proved to lie inside their storages."""

from __future__ import annotations

from typing import Any, ClassVar, TypeGuard

from anycard.errors import FormatError
from anycard.pickles.budget import Budget
from anycard.pickles.stubs import Inert
from anycard.tensors import DTYPES, Storage, TensorInfo, form_of, span_numel

# Sizes, strides and offsets in bytes then fit 64 bits: the widest element has 16.
MOST_ELEMENTS = 1 << 58
# Quantised dtypes, and what their elements are without a scale; two and four of them may share a byte.
INTEGERS = {"qint8": "int8", "quint8": "uint8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}


class Built(Inert):
    """An object that its BUILD makes a tensor.

    Attributes:
        result: The tensor, once it is known.
    """

    result: TensorInfo | None = None


class StoredStorage(Inert):
    """A storage that a persistent id names; its class is the storage class. As data, `args[0]` is all of it.

    Attributes:
        dtype: The storage class's dtype; None for untyped.
        storage, numel, start: The bytes, how many elements of them, and the first byte.
    """

    dtype: ClassVar[str | None] = None
    storage: Storage | None = None
    numel: int = 0
    start: int = 0

    @classmethod
    def of(cls, storage: Storage, numel: int, start: int = 0) -> StoredStorage:
        """The stub for a storage."""
        stub = object.__new__(cls)
        stub.storage, stub.numel = storage, numel
        if start:
            stub.start = start
        return stub

    @property
    def args(self) -> tuple[TensorInfo, ...]:  # type: ignore[override]
        """The storage as a tensor of one dimension; made when asked for, as hardly anyone does."""
        if self.storage is None:
            return ()
        dtype = type(self).dtype or "uint8"
        return (TensorInfo(form_of(INTEGERS.get(dtype, dtype), (self.numel,)), self.storage, self.start),)


def is_storage_class(kind: Any) -> TypeGuard[type[StoredStorage]]:
    """A persistent id may name it as a storage's class."""
    return isinstance(kind, type) and issubclass(kind, StoredStorage)


def ints(budget: Budget, values: Any, what: str) -> tuple[int, ...]:
    """Sizes, strides or an offset: non-negative, of 64 bits, not more of them than dimensions may be."""
    if not isinstance(values, (tuple, list)) or len(values) > budget.limits.rank:
        raise FormatError(f"a tensor's {what} is a {type(values).__name__}, or has too many dimensions")
    for value in values:
        if type(value) is not int or not 0 <= value < MOST_ELEMENTS:
            raise FormatError(f"a tensor's {what} is not made of non-negative integers that torch can hold")
    return tuple(values)


def sized(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Refuse sizes without their strides, and more elements than 64 bits count."""
    if len(shape) != len(stride):
        raise FormatError(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    elements = 1
    for size in shape:
        elements *= size or 1
    if elements >= MOST_ELEMENTS:
        raise FormatError("a tensor claims more elements than torch can count")


def view(
    storage: Storage, dtype: str, start: int, shape: tuple[int, ...], stride: tuple[int, ...], **more: Any
) -> TensorInfo:
    """A tensor, its elements proved to lie in the storage."""
    sized(shape, stride)
    end = start + span_numel(shape, stride) * DTYPES[dtype].itemsize
    if end > storage.nbytes and 0 not in shape:
        raise FormatError(
            f"a tensor ({dtype}, {' x '.join(map(str, shape))}) needs {end:,} bytes of storage {short(storage.key)}, "
            f"which has {storage.nbytes:,}"
        )
    return TensorInfo(form_of(dtype, shape, stride, **more), storage, start)


def short(text: str) -> str:
    """A name out of a file, of a length that a message can hold."""
    return text if len(text) <= 80 else text[:77] + "..."
