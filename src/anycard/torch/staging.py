"""Stored bytes to tensors that cannot take them as they are: of another dtype or other strides, or on a card.

They pass a buffer that each reader has, so that no tensor needs a second one of its size. Before a card it is pinned:
copies from it need no other copy on their way.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence

import torch

from anycard.disk.transfer import Piece
from anycard.tensors import TensorInfo, is_dense
from anycard.torch.dtypes import PLAIN, TO_TORCH
from anycard.torch.parts import in_order, parts
from anycard.torch.streams import on, stream_of

_READERS_FOR_CARDS = 7  # of a chunk each; one reader alone does not keep up with a card


class Staging:
    """The buffers of one load (a `disk.transfer.Stage`).

    Args:
        tensors: Where stored tensors go, each of as many elements.
        infos: The stored tensors, of which `fits` is true.

    Attributes:
        readers: How many are of use; None where what else is true of the machine says that.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], infos: Sequence[TensorInfo]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            rows = zip(tensors, infos, strict=True)
            self._targets = [t.detach() if i.form.row_major else in_order(t.detach(), i.stride) for t, i in rows]
        self._infos = infos
        streams = map(stream_of, {target.device for target in self._targets})
        self._streams = [stream for stream in streams if stream is not None]
        self._own = threading.local()
        self.readers = min(_READERS_FOR_CARDS, os.cpu_count() or 1) if self._streams else None

    def buffer(self, nbytes: int) -> int:
        """The address of this thread's buffer."""
        held: torch.Tensor | None = getattr(self._own, "buffer", None)
        if held is None:
            held = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=bool(self._streams))
            self._own.buffer = held
        return held.data_ptr()

    def take(self, pieces: Iterable[Piece]) -> None:
        """Bring the bytes that lie in this thread's buffer to their tensors."""
        buffer = self._own.buffer
        with torch.inference_mode(), contextlib.ExitStack() as cards:  # in which alone inference tensors take values
            for stream in self._streams:
                cards.enter_context(on(stream))
            for read, into, nbytes, address in pieces:
                at = address - buffer.data_ptr()
                self._bring(self._targets[read], self._infos[read], into, buffer[at : at + nbytes])
        for stream in self._streams:
            stream.synchronize()  # before the buffer is used again

    def _bring(self, target: torch.Tensor, info: TensorInfo, into: int, raw: torch.Tensor) -> None:
        values = _values(raw, info)
        first = into // info.itemsize
        if target.is_cuda and target.dtype != values.dtype:
            values = values.to(target.device, non_blocking=True)  # cast there
        at = 0
        for part in parts(target, first, first + len(values)):
            part.copy_(values[at : at + part.numel()].view(part.shape), non_blocking=target.is_cuda)
            at += part.numel()


def _values(raw: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """The elements that bytes spell, in this machine's order."""
    dtype = TO_TORCH[info.dtype]
    if info.storage.big_endian and info.itemsize > 1:
        raw = raw.view(-1, info.itemsize // (2 if dtype.is_complex else 1)).flip(1).reshape(-1)
    return raw.view(dtype)


def fits(tensor: torch.Tensor, info: TensorInfo) -> bool:
    """The stored elements lie in a file without gaps, and the tensor is one that holds its own."""
    storage, form = info.storage, info.form
    if storage.source is None or storage.offset is None or storage.missing or form.conj or form.neg:
        return False
    if info.dtype not in TO_TORCH or not is_dense(form.shape, form.stride):
        return False
    return (type(tensor) in PLAIN or type(tensor.data) is torch.Tensor) and tensor.layout is torch.strided
