"""Stored tensors as memory mapped from their file: pages are read when they are touched, and copied when written."""

from __future__ import annotations

import mmap
from bisect import bisect_left

import torch

from anycard.disk.source import Source
from anycard.tensors import DTYPES, TensorInfo
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.reading import plain_bytes


class Mappings:
    """The mappings of one load, one for each file; the tensors keep them alive."""

    def __init__(self) -> None:
        self._maps: dict[Source, mmap.mmap | None] = {}
        self._taken: dict[Source, tuple[list[int], list[int]]] = {}

    def tensor(self, info: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor over the file's own pages; None where it has to be read.

        That is where the bytes do not lie in a file as they are (deflated, big-endian), are not row-major, not of
        the dtype that is needed, or do not begin where its elements may; and where some of them are mapped for
        another tensor: the model keeps the two apart, whatever the file does.
        """
        source, offset = info.storage.source, info.offset
        if source is None or offset is None or not plain_bytes(info) or not info.contiguous or not info.nbytes:
            return None
        if TO_TORCH.get(info.dtype) != dtype:
            return None
        if source not in self._maps:
            self._maps[source] = source.mapped()
        held = self._maps[source]
        offset += source.base
        if held is None or offset % DTYPES[info.dtype].itemsize or offset + info.nbytes > len(held):
            return None
        if not self._take(source, offset, offset + info.nbytes):
            return None
        return torch.frombuffer(held, dtype=dtype, count=info.numel, offset=offset).reshape(shape)

    def _take(self, source: Source, start: int, end: int) -> bool:
        """Have a stretch of a file for one tensor, unless a part of it is taken."""
        starts, ends = self._taken.setdefault(source, ([], []))
        at = bisect_left(ends, start + 1)
        if at < len(starts) and starts[at] < end:
            return False
        starts.insert(at, start)
        ends.insert(at, end)
        return True
