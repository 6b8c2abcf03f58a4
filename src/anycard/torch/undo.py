"""The way back for a load that fails after its first byte."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.errors import CheckpointError
from anycard.torch.dtypes import is_plain


class _Copy:
    """The bytes of dense CPU tensors, one after the other: a copy of each by itself takes far longer."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._sizes = [tensor.nbytes for tensor in tensors]
        self._memory = torch.empty(sum(self._sizes), dtype=torch.uint8, device="cpu")
        self._places = list(itertools.accumulate(self._sizes, initial=self._memory.data_ptr()))[:-1]
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._forms = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        collections.deque(map(ctypes.memmove, self._places, self._addresses, self._sizes), maxlen=0)

    def back(self) -> None:
        """Give the tensors their bytes back; new memory to those that have been given other memory meanwhile."""
        rows = zip(self._tensors, self._places, self._addresses, self._sizes, self._forms, strict=True)
        for tensor, place, address, nbytes, (dtype, shape, stride) in rows:
            if tensor.is_cpu and tensor.dtype == dtype and tensor.nbytes == nbytes and tensor.data_ptr() == address:
                ctypes.memmove(address, place, nbytes)
            elif nbytes:
                first = place - self._memory.data_ptr()
                old = self._memory[first : first + nbytes].clone().view(dtype)
                tensor.data = old.as_strided(shape, stride)


class Undo:
    """What gives an existing model its old values back, in the reverse order of the changes.

    Attributes:
        lost: Names of tensors that are written in place without a copy, because copies would not fit.
        started: The first of them may have been written.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self.lost: tuple[str, ...] = ()
        self.started = False

    def then(self, step: Callable[[], None]) -> None:
        """Remember how to take back one change that is about to be made."""
        self._steps.append(step)

    def keep_bytes(self, tensors: Iterable[torch.Tensor], dense: Iterable[torch.Tensor] = ()) -> None:
        """Copy the values of tensors that are about to be written.

        Args:
            dense: More of them, of which it is known that they lie on the CPU without gaps.
        """
        plain = list(dense)
        kept = []
        for tensor in tensors:
            if is_plain(tensor) and tensor.is_cpu:
                plain.append(tensor)
            elif not (is_lazy(tensor) or tensor.is_meta):
                kept.append((tensor, tensor.detach().clone()))
        copy = _Copy(plain)

        def back() -> None:
            with torch.no_grad():
                for tensor, old in kept:
                    tensor.detach().copy_(old)
            copy.back()

        self.then(back)

    def keep_slots(self, module: nn.Module) -> None:
        """Remember which tensors stand in a module's parameters and buffers, and the memory they have."""
        held = [(slots, dict(slots)) for slots in (module._parameters, module._buffers)]
        data = [(p, p.data) for p in module._parameters.values() if p is not None and not is_lazy(p)]

        def back() -> None:
            for slots, old in held:
                slots.clear()
                slots.update(old)  # type: ignore[arg-type]
            for parameter, memory in data:
                if not parameter.is_meta:
                    parameter.data = memory

        self.then(back)

    def restore(self, error: BaseException) -> None:
        """Take everything back; what cannot be is named in the error's `.changed` and message."""
        while self._steps:
            with contextlib.suppress(Exception):  # the first error is the one to tell; the other steps matter too
                self._steps.pop()()
        if not (self.started and self.lost):
            return
        text = f"{len(self.lost)} tensors of the model were overwritten at least in part; .changed names them."
        error.changed = self.lost  # type: ignore[attr-defined]
        if isinstance(error, CheckpointError):
            error.args = (f"{error.args[0]} {text}", *error.args[1:])
        elif hasattr(error, "add_note"):
            error.add_note(text)
