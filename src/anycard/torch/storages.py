"""Live tensors on their way into a torch zip: which storages are written, and what refers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.disk.pieces import Piece
from anycard.errors import CheckpointError
from anycard.pickles.writer import TensorRef
from anycard.tensors import is_dense, row_major, span_numel
from anycard.torch.dtypes import FROM_TORCH, PLAIN
from anycard.torch.tensor_piece import TensorPiece


class Storages:
    """Compact: every tensor has a storage of its own bytes only, tied ones share it.

    Attributes:
        learned: Tensors that are no parameters keep `requires_grad`.
    """

    learned = False

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._known: dict[tuple[Any, ...], TensorRef] = {}
        self._alive: list[torch.Tensor] = []  # so that no address is used again

    def ref(self, tensor: torch.Tensor, name: str) -> TensorRef:
        """The reference to write for a tensor; its bytes are queued once.

        Raises:
            CheckpointError: A tensor of a kind that is not written; names it.
        """
        refuse_kinds(tensor, name)
        parameter = isinstance(tensor, nn.Parameter)
        where = identity(tensor)
        place = self._place_of(tensor)
        if place not in self._known:
            grad = bool(tensor.requires_grad and (parameter or self.learned))
            self._known[place] = self._made(tensor, where, parameter, grad)
            self._alive.append(tensor)
        return self._known[place]

    def known(self, tensor: torch.Tensor) -> TensorRef | None:
        """The reference that was made for a tensor, if one was."""
        try:
            return self._known.get(self._place_of(tensor))
        except (RuntimeError, NotImplementedError):  # of a kind that is not written
            return None

    def _place_of(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Equal for tensors that one reference is written for: the same parameter or view."""
        return (*identity(tensor), isinstance(tensor, nn.Parameter), tensor.requires_grad)

    def _made(self, tensor: torch.Tensor, where: tuple[Any, ...], parameter: bool, grad: bool) -> TensorRef:
        bare = (*where, None, None)
        if bare not in self._known:
            shape = tuple(tensor.shape)
            stride = tuple(tensor.stride()) if _keeps_strides(tensor) else row_major(shape)
            key = self._queue(tensor)
            self._known[bare] = TensorRef(key, FROM_TORCH[tensor.dtype], "cpu", tensor.numel(), 0, shape, stride)
        held = self._known[bare]
        return TensorRef(
            held.storage_key, held.dtype, held.device, held.storage_numel, held.storage_offset, held.shape, held.stride,
            requires_grad=grad, parameter=parameter,
        )  # fmt: skip

    def _queue(self, tensor: torch.Tensor) -> str:
        return self.add(TensorPiece(tensor, keep_order=True))

    def add(self, piece: Piece) -> str:
        """Queue a storage; gives its key."""
        self.pieces.append(piece)
        return str(len(self.pieces) - 1)


@dataclass
class _Span:
    """The part of a memory that tensors of one dtype look at, in bytes, and a storage that holds all of it."""

    start: int
    end: int
    storage: torch.UntypedStorage
    key: str = ""

    def widen(self, start: int, end: int, storage: torch.UntypedStorage) -> None:
        if end > self.end:  # several storages may begin at one address, some shorter than others
            self.end, self.storage = end, storage
        self.start = min(self.start, start)


class SharedStorages(Storages):
    """Views of one memory stay together, in the span that is in use. Every tensor is to be noted first.

    A span for each dtype: torch takes all of a record for the dtype that it meets first.
    """

    learned = True

    def __init__(self) -> None:
        super().__init__()
        self._spans: dict[tuple[Any, ...], _Span] = {}

    def note(self, tensor: torch.Tensor) -> None:
        """Widen the span of the tensor's memory; the tensor is of a kind that is written."""
        if not _shares(tensor):
            return
        size, storage = tensor.element_size(), tensor.untyped_storage()
        start = int(tensor.storage_offset()) * size
        end = start + span_numel(tuple(tensor.shape), tuple(tensor.stride())) * size
        self._spans.setdefault(_memory_of(tensor), _Span(start, end, storage)).widen(start, end, storage)
        self._alive.append(tensor)

    def _place_of(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Two objects on one memory stay two: an optimizer counts them so."""
        return ("object", id(tensor))

    def _made(self, tensor: torch.Tensor, where: tuple[Any, ...], parameter: bool, grad: bool) -> TensorRef:
        span = self._spans.get(_memory_of(tensor)) if _shares(tensor) else None
        if span is None:
            return super()._made(tensor, where, parameter, grad)
        nbytes, size = span.end - span.start, tensor.element_size()
        if not span.key:
            span.key = self.add(TensorPiece(_bytes_of(span.storage, span.start, nbytes)))
        offset = int(tensor.storage_offset()) - span.start // size
        return TensorRef(
            span.key, FROM_TORCH[tensor.dtype], "cpu", nbytes // size, offset, tuple(tensor.shape),
            tuple(tensor.stride()), requires_grad=grad, parameter=parameter,
        )  # fmt: skip


def _shares(tensor: torch.Tensor) -> bool:
    """The tensor is written as the view that it is."""
    return bool(tensor.numel()) and not (tensor.is_conj() or tensor.is_neg())


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.device, tensor.dtype


def _bytes_of(storage: torch.UntypedStorage, start: int, nbytes: int) -> torch.Tensor:
    """A stretch of a storage, byte by byte."""
    held = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return held.set_(storage, start, (nbytes,))  # type: ignore[call-overload, no-any-return]


def all_of(storage: torch.TypedStorage) -> torch.Tensor:
    """All elements of a storage."""
    held: torch.UntypedStorage = storage._untyped_storage  # what else it has warns that it will go
    tensor = torch.empty(0, dtype=storage.dtype, device=held.device)
    return tensor.set_(held, 0, (held.nbytes() // tensor.element_size(),))  # type: ignore[call-overload, no-any-return]


def refuse_kinds(tensor: torch.Tensor, name: str) -> None:
    """CheckpointError for a tensor that is not written: sparse, nested, on meta, without memory, of unknown dtype…"""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise CheckpointError(f"{name} is a {kind} tensor; only dense tensors are written", name=name)
    if is_lazy(tensor):
        raise CheckpointError(f"{name} is not initialised yet: run the model once before it is saved", name=name)
    if tensor.is_meta:
        raise CheckpointError(f"{name} stands on the meta device: it has no values to save", name=name)
    if not _has_memory(tensor):
        kind = type(tensor).__name__
        message = f"{name} is a {kind}, a tensor subclass without memory of its own: save the tensors that it keeps"
        if type(tensor) in PLAIN:
            message = f"{name} has no memory for its {tensor.numel():,} elements: it was freed (by FSDP, or resize_)"
        raise CheckpointError(message, name=name)
    if tensor.dtype not in FROM_TORCH:
        raise CheckpointError(f"{name}: {tensor.dtype} cannot be written", name=name)


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        storage = tensor.untyped_storage()
        if not tensor.numel():
            return True
        end = int(tensor.storage_offset()) + span_numel(tuple(tensor.shape), tuple(tensor.stride()))
        return storage.data_ptr() != 0 and end * tensor.element_size() <= storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return False


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tied tensors: the same view of the same memory."""
    place = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return (
        place, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype,
        tensor.device, tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def _keeps_strides(tensor: torch.Tensor) -> bool:
    return is_dense(tuple(tensor.shape), tuple(tensor.stride()))
