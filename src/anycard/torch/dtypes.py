"""Between torch's dtypes and the names in `anycard.tensors`; between tensors and their bytes."""

from __future__ import annotations

import ctypes

import torch

from anycard.tensors import DTYPES

TO_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)
}
FROM_TORCH: dict[torch.dtype, str] = {dtype: name for name, dtype in TO_TORCH.items()}


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a dense CPU tensor, first element to last, as a writable view; the tensor must outlive it."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
