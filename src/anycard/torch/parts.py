"""A tensor of any strides as views that hold its elements in order: what goes through a buffer goes by these."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


def parts(tensor: torch.Tensor, first: int, last: int) -> Iterator[torch.Tensor]:
    """Views of the tensor that together hold its elements from `first` up to `last`, counted in row-major order."""
    if first >= last:
        return
    if first == 0 and last == tensor.numel():
        yield tensor
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)[first:last]
        return
    row = math.prod(tensor.shape[1:])
    begin, end = -(-first // row), last // row  # of the rows that are wanted as a whole
    if begin > end:
        yield from parts(tensor[end], first - end * row, last - end * row)
        return
    if first < begin * row:
        yield from parts(tensor[begin - 1], first - (begin - 1) * row, row)
    if begin < end:
        yield tensor[begin:end]
    if end * row < last:
        yield from parts(tensor[end], 0, last - end * row)


def in_order(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor with its dimensions as they follow each other in memory of these strides, the largest step first."""
    return tensor.permute(sorted(range(len(stride)), key=lambda dim: -stride[dim]))
