"""Between torch's dtypes and the names in `anycard.tensors`."""

from __future__ import annotations

import torch

from anycard.tensors import DTYPES

TO_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)
}
FROM_TORCH: dict[torch.dtype, str] = {dtype: name for name, dtype in TO_TORCH.items()}


# Tensors of these classes are what they seem: their memory is their elements.
PLAIN = frozenset([torch.Tensor, torch.nn.Parameter])


def is_plain(tensor: torch.Tensor) -> bool:
    """Its elements lie one after the other in memory of its own, in row-major order."""
    return type(tensor) in PLAIN and tensor.layout is torch.strided and tensor.is_contiguous()
