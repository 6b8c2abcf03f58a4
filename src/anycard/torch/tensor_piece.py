"""A live tensor's bytes on their way into a file."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from anycard.disk.vectors import memory
from anycard.tensors import is_dense
from anycard.torch.dtypes import is_plain
from anycard.torch.parts import in_order, parts
from anycard.torch.streams import on, stream_of


class TensorPiece:
    """A tensor's elements on the CPU (a `disk.pieces.Piece`): from where they lie, or through a buffer of one chunk.

    Args:
        keep_order: Dense elements go in the order that they have in memory, others in row-major order; False: all do.
    """

    def __init__(self, tensor: torch.Tensor, *, keep_order: bool = False) -> None:
        self._tensor = tensor
        self._keep_order = keep_order
        self._stream = stream_of(tensor.device)
        self.nbytes = tensor.numel() * tensor.element_size()

    def chunks(self, chunk_nbytes: int) -> Iterator[memoryview]:
        """See `Piece`."""
        tensor = self._ordered()
        size = tensor.element_size()
        step = max(1, chunk_nbytes // size)
        lies_so = tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        buffer = tensor if lies_so else _buffer(tensor, min(step, tensor.numel()))
        for first in range(0, tensor.numel(), step):
            last = min(first + step, tensor.numel())
            if lies_so:
                yield memory(tensor.data_ptr() + first * size, (last - first) * size)
            else:
                with on(self._stream):
                    _copy(tensor, first, last, buffer)
                yield memory(buffer.data_ptr(), (last - first) * size)

    def _ordered(self) -> torch.Tensor:
        """The plain tensor, whatever its class, whose row-major order is the one to write."""
        if is_plain(self._tensor):
            return self._tensor
        with torch._C.DisableTorchFunctionSubclass():
            plain = self._tensor.detach()
            stride = tuple(plain.stride())
            return in_order(plain, stride) if self._keep_order and is_dense(tuple(plain.shape), stride) else plain


def _buffer(tensor: torch.Tensor, numel: int) -> torch.Tensor:
    """Pinned where the tensor is on a card, from which copies are faster then."""
    return torch.empty(numel, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


def _copy(tensor: torch.Tensor, first: int, last: int, buffer: torch.Tensor) -> None:
    at = 0
    with torch.inference_mode():
        for part in parts(tensor, first, last):
            buffer[at : at + part.numel()].view(part.shape).copy_(part)
            at += part.numel()
