"""Where tensors should go, and whether that is there."""

from __future__ import annotations

import os
from typing import Any

import torch

from anycard.errors import DeviceError


def find_device(device: Any) -> torch.device:
    """The device asked for as its tensors name it ("cuda" is "cuda:0" to them), checked to be there.

    Raises:
        DeviceError: This machine lacks it; says what is there, and CUDA_VISIBLE_DEVICES where it is set.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        if type(device) is int:  # the number of a card, where there is none
            raise DeviceError(f"device={device} is not there. This machine has: {_present()}.{_visible()}") from None
        raise DeviceError(f"device={device!r} is not a device: {str(error).splitlines()[0]}") from None
    if wanted.type == "meta":
        raise DeviceError("device='meta' has no memory to load into: anycard.plan tells what would be loaded")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        raise DeviceError(f"device={str(wanted)!r} is not there. This machine has: {_present()}.{_visible()}") from None


def move(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a tensor of a model other memory; its gradient goes along, where and as an optimizer wants it."""
    counted = not tensor.is_inference()  # which has no version, whatever memory it is given
    tensor.data = data
    if counted:
        torch.autograd.graph.increment_version(tensor)  # `.data =` is nothing that autograd sees
    gradient = tensor.grad
    if gradient is not None and (gradient.dtype != data.dtype or gradient.device != data.device):
        gradient.data = gradient.detach().to(device=data.device, dtype=data.dtype)


def _present() -> str:
    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        count = getattr(torch, kind).device_count()
        found += [f"{kind}:{i}" for i in range(count)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def _visible() -> str:
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" CUDA_VISIBLE_DEVICES is {value!r}."
