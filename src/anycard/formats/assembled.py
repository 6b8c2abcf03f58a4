"""A tensor that lies in several places: its row-major bytes, put together from its chunks as they are read."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.tensors import DTYPES, Storage, TensorInfo, form_of

_BLOCK = 1 << 20  # bytes of short runs that are read at once
_LONG = 1 << 14  # a run of so many bytes is read straight to where it stays
_COMPARED = 300_000  # pairs of boxes of all tensors of a read, and some more for each box: grids have few

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, and its sizes


class Chunk(NamedTuple):
    """A box of a tensor: where it begins, and its elements."""

    offsets: tuple[int, ...]
    info: TensorInfo


class Prover:
    """Proves of the tensors of one read that boxes fill them; how much it compares is bounded over all of them."""

    def __init__(self) -> None:
        self._left = _COMPARED

    def prove(self, name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
        """Boxes, none of them empty, fill a tensor once and wholly.

        Raises:
            FormatError: One lies outside, two overlap, or elements are missing.
        """
        for at, size in boxes:
            inside = len(at) == len(size) == len(shape)
            if not inside or any(a + n > most for a, n, most in zip(at, size, shape, strict=True)):
                raise FormatError(
                    f"{name}: a chunk of {list(size)} at {list(at)} lies outside {list(shape)}", name=name
                )
        have, want = sum(math.prod(size) for _, size in boxes), math.prod(shape)
        if have != want:
            raise FormatError(f"{name} is not whole: its chunks have {have:,} elements of {want:,}", name=name)
        self._left += 64 * len(boxes)
        self._refuse_overlap(name, _cut(boxes, len(shape)))

    def _refuse_overlap(self, name: str, boxes: Sequence[Box]) -> None:
        """In the order of the dimension that is cut most, only boxes that reach a box are compared with it."""
        rank = len(boxes[0][0]) if boxes else 0
        if not rank and len(boxes) > 1:
            raise FormatError(f"{name}: its chunks overlap", name=name)
        cut = max(range(rank), key=lambda d: len({at[d] for at, _ in boxes}), default=0)
        near: list[Box] = []
        for at, size in sorted(boxes, key=lambda box: box[0][cut : cut + 1]):
            near = [(bt, m) for bt, m in near if bt[cut] + m[cut] > at[cut]]
            self._left -= len(near)
            if self._left < 0 or any(_meet(at, size, bt, m) for bt, m in near):
                raise FormatError(f"{name}: its chunks overlap, or are cut in an endless way", name=name)
            near.append((at, size))


def _cut(boxes: Sequence[Box], rank: int) -> list[Box]:
    """The boxes in the dimensions in which they differ: in the others, all meet."""
    kept = [d for d in range(rank) if len({(at[d], size[d]) for at, size in boxes}) > 1]
    return [(tuple(at[d] for d in kept), tuple(size[d] for d in kept)) for at, size in boxes]


def assemble(
    name: str,
    owner: Source,
    dtype: str,
    shape: tuple[int, ...],
    chunks: Sequence[Chunk],
    prover: Prover | None = None,
) -> TensorInfo:
    """The tensor that chunks make, proved to fill it once and wholly.

    Args:
        prover: That of the read, where it makes many.

    Raises:
        FormatError: A chunk lies outside, overlaps another, or elements are missing.
    """
    chunks = [chunk for chunk in chunks if chunk.info.numel]
    (prover or Prover()).prove(name, shape, [(chunk.offsets, chunk.info.shape) for chunk in chunks])
    whole = len(chunks) == 1 and chunks[0].info.shape == shape
    if whole:
        return chunks[0].info
    odd = next((c.info.storage for c in chunks if c.info.storage.missing or c.info.storage.big_endian), None)
    if any(c.info.nbytes > c.info.storage.nbytes for c in chunks):  # strides of 0: what is written whole has none
        raise FormatError(f"{name}: a chunk claims more elements than it stores", name=name)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if odd is not None or any(c.info.conj or c.info.neg for c in chunks):
        why = (odd and odd.missing) or "its chunks have another byte order, or are lazily conjugated"
        return TensorInfo(form_of(dtype, shape), Storage(name, nbytes, missing=why))
    source = Assembled(owner.name, shape, DTYPES[dtype].itemsize, chunks)
    return TensorInfo(form_of(dtype, shape), Storage(name, nbytes, "cpu", source, 0))


def _meet(at: tuple[int, ...], size: tuple[int, ...], bt: tuple[int, ...], m: tuple[int, ...]) -> bool:
    return all(a < b + k and b < a + n for a, n, b, k in zip(at, size, bt, m, strict=True))


class Assembled(Source):
    """The row-major bytes of a tensor in chunks; memory is taken for a block of short runs at most.

    Attributes:
        storages: What the chunks are views of.
    """

    def __init__(self, name: str, shape: tuple[int, ...], itemsize: int, chunks: Sequence[Chunk]) -> None:
        super().__init__(name, math.prod(shape) * itemsize)
        self.storages = [chunk.info.storage for chunk in chunks]
        split = max((d for c in chunks for d in range(len(shape)) if c.info.shape[d] != shape[d]), default=0)
        self._parts = sorted((_Part(c, shape, split, itemsize) for c in chunks), key=lambda part: part.first)

    def read_into(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        if end > self.size:
            raise self._short(offset, len(view))
        for part in self._parts:
            if part.first < end and offset < part.end:
                part.copy(offset, view)


class _Part:
    """A chunk as runs of bytes that lie together in the tensor: those of its last cut dimension and all below."""

    def __init__(self, chunk: Chunk, shape: tuple[int, ...], split: int, itemsize: int) -> None:
        self._info = info = chunk.info
        below = math.prod(shape[split + 1 :]) * itemsize
        self._outer = info.shape[:split]
        self._steps = [math.prod(shape[d + 1 :]) * itemsize for d in range(split)]
        self._base = sum(at * math.prod(shape[d + 1 :]) for d, at in enumerate(chunk.offsets)) * itemsize
        self._run = info.shape[split] * below if shape else itemsize
        self._runs = math.prod(self._outer)
        self.first = self._base
        self.end = self._at(self._runs - 1) + self._run

    def _at(self, index: int) -> int:
        """Where a run begins in the tensor."""
        place = self._base
        for size, step in zip(reversed(self._outer), reversed(self._steps), strict=True):
            index, inner = divmod(index, size)
            place += inner * step
        return place

    def copy(self, offset: int, view: memoryview) -> None:
        """Write what the chunk has of the tensor's bytes from `offset` on."""
        end = offset + len(view)
        dense = None if self._info.contiguous else _dense(self._info)  # once for all runs
        index = bisect_right(range(self._runs), offset - self._run, key=self._at)
        stop = bisect_left(range(self._runs), end, key=self._at)
        while index < stop:
            at = self._at(index)
            if self._run >= _LONG or at < offset or at + self._run > end:
                low, high = max(at, offset), min(at + self._run, end)
                read_row_major(self._info, index * self._run + low - at, view[low - offset : high - offset], dense)
                index += 1
            else:
                count = min(stop - index, max(_BLOCK // self._run, 1))
                count -= self._at(index + count - 1) + self._run > end
                self._scatter(index, count, offset, view, dense)
                index += count

    def _scatter(self, index: int, count: int, offset: int, view: memoryview, dense: memoryview | None) -> None:
        """Read many short runs at once, and put each to its place."""
        import numpy as np

        block = bytearray(count * self._run)
        read_row_major(self._info, index * self._run, memoryview(block), dense)
        places = np.full(count, self._base - offset, np.int64)
        rest: Any = np.arange(index, index + count)
        for size, step in zip(reversed(self._outer), reversed(self._steps), strict=True):
            rest, inner = np.divmod(rest, size)
            places += inner * step
        target = np.frombuffer(view, np.uint8)
        target[places[:, None] + np.arange(self._run)] = np.frombuffer(block, np.uint8).reshape(count, self._run)


def read_row_major(info: TensorInfo, start: int, view: memoryview, dense: memoryview | None = None) -> None:
    """Fill a view with a part of a tensor's row-major bytes: of `dense` where they lie otherwise."""
    storage = info.storage
    if dense is None and not info.contiguous:
        dense = _dense(info)
    if dense is not None:
        view[:] = dense[start : start + len(view)]
    elif storage.data is not None:
        view[:] = storage.data[info.start + start : info.start + start + len(view)]
    else:
        assert storage.source is not None and storage.offset is not None
        storage.source.read_into(storage.offset + info.start + start, view)


def _dense(info: TensorInfo) -> memoryview:
    """A chunk with strides, made row-major; all of it, as few are stored so."""
    import numpy as np

    data = bytearray(info.span)
    read_row_major(TensorInfo(form_of("uint8", (info.span,)), info.storage, info.start), 0, memoryview(data))
    size = DTYPES[info.dtype].itemsize
    flat = np.frombuffer(data, dtype=f"V{size}")
    steps = tuple(step * size for step in info.stride)
    dense = np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, info.shape, steps))
    return memoryview(dense.reshape(-1).view(np.uint8).data)
