"""Between torch's dtypes and the names in `anycard.tensors`; between tensors and their bytes."""

from __future__ import annotations

import torch

from anycard.tensors import DTYPES

TO_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)
}
FROM_TORCH: dict[torch.dtype, str] = {dtype: name for name, dtype in TO_TORCH.items()}


def flat_bytes(storage: torch.UntypedStorage, start: int, nbytes: int) -> torch.Tensor:
    """A uint8 view, shape (nbytes,), of a stretch of a CPU storage; shares its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (nbytes,))  # type: ignore[call-overload, no-any-return]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a dense CPU tensor, first element to last, as a writable view."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    flat = flat_bytes(tensor.untyped_storage(), start, tensor.numel() * tensor.element_size())
    return memoryview(flat.numpy().data)
