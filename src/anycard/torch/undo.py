"""The way back for a load that fails after its first byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.disk.keeping import keep
from anycard.disk.vectors import memory
from anycard.errors import CheckpointError
from anycard.names.paths import join
from anycard.torch.attributes import Attributes
from anycard.torch.dtypes import TO_TORCH, is_plain
from anycard.torch.reading import Filling

_Form = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]  # dtype, sizes, strides


class _Copy:
    """The bytes of dense CPU tensors, one after the other: a copy of each by itself takes far longer.

    Attributes:
        forms: Gives the tensors' forms; asked only when they are to be given back.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: NDArray[np.uint64],
        sizes: NDArray[np.int64],
        forms: Callable[[], Iterable[_Form]],
    ) -> None:
        self._tensors, self._addresses, self._sizes, self._forms = tensors, addresses, sizes, forms
        self._source = keep(addresses, sizes)
        self.close = self._source.close

    def back(self) -> None:
        """Give the tensors their bytes back; new memory to those that have been given other memory meanwhile."""
        places = np.cumsum(self._sizes) - self._sizes
        columns = (column.tolist() for column in (places, self._addresses, self._sizes))
        rows = zip(self._tensors, *columns, self._forms(), strict=True)
        for tensor, place, address, nbytes, (dtype, shape, stride) in rows:
            if not nbytes:
                continue
            if tensor.is_cpu and tensor.dtype == dtype and tensor.nbytes == nbytes and tensor.data_ptr() == address:
                self._source.read_into(place, memory(address, nbytes))
            else:
                old = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                self._source.read_into(place, memory(old.data_ptr(), nbytes))
                tensor.data = old.view(dtype).as_strided(shape, stride)


class Undo:
    """What gives an existing model its old values back, in the reverse order of the changes.

    Attributes:
        within: The object among several whose tensors are in hand.
        lost: Names of tensors that may have been written in place without a copy, because copies would not fit.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._copies: list[_Copy] = []
        self.within = ""
        self.lost: tuple[str, ...] = ()

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        for copy in self._copies:
            copy.close()

    def then(self, step: Callable[[], None]) -> None:
        """Remember how to take back one change that is about to be made."""
        self._steps.append(step)

    def lose(self, names: Iterable[str]) -> None:
        """There is no way back for these tensors, which are about to be written."""
        self.lost += tuple(join(self.within, name) for name in names)

    def keep_bytes(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the values of tensors that are about to be written."""
        plain = []
        kept = []
        for tensor in tensors:
            if is_plain(tensor) and tensor.is_cpu:
                plain.append(tensor)
            elif not (is_lazy(tensor) or tensor.is_meta):
                kept.append((tensor, tensor.detach().clone()))
        forms: list[_Form] = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in plain]
        addresses = np.array([tensor.data_ptr() for tensor in plain], np.uint64)
        self._keep(plain, addresses, np.array([tensor.nbytes for tensor in plain], np.int64), lambda: forms)

        def back() -> None:
            with torch.no_grad():
                for tensor, old in kept:
                    tensor.detach().copy_(old)

        if kept:
            self.then(back)

    def keep_filled(self, filling: Filling) -> None:
        """Copy the values of what is about to be filled."""
        self.keep_bytes(filling.staged.tensors)
        if not filling.reads:
            return
        addresses = np.concatenate([reads.addresses for _, reads in filling.reads])
        sizes = np.concatenate([reads.nbytes for _, reads in filling.reads])

        def forms() -> Iterable[_Form]:  # they are what is stored: else no bytes would go straight
            return ((TO_TORCH[info.dtype], info.shape, info.stride) for info in filling.straight.infos)

        self._keep(filling.straight.tensors, addresses, sizes, forms)

    def _keep(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: NDArray[np.uint64],
        sizes: NDArray[np.int64],
        forms: Callable[[], Iterable[_Form]],
    ) -> None:
        if tensors:
            copy = _Copy(tensors, addresses, sizes, forms)
            self._copies.append(copy)
            self.then(copy.back)

    def keep_modules(self, module: nn.Module) -> None:
        """Remember all that a module and those in it are made of, before code of theirs runs."""
        inside = list(module.modules())
        self.keep_bytes((*module.parameters(), *module.buffers()))
        for inner in inside:
            self.keep_slots(inner)
        self.then(Attributes(inside).put_back)

    def keep_slots(self, module: nn.Module) -> None:
        """Remember which tensors stand in a module's parameters and buffers, and the memory they have."""
        held = [(slots, dict(slots)) for slots in (module._parameters, module._buffers)]
        own = [tensor for slots, _ in held for tensor in slots.values() if tensor is not None]
        lazy = [(tensor, type(tensor)) for tensor in own if is_lazy(tensor)]
        data = [(each, each.data) for tensor in own for each in (tensor, tensor.grad) if each is not None]

        def back() -> None:
            for slots, old in held:
                slots.clear()
                slots.update(old)  # type: ignore[arg-type]
            for tensor, values in data:
                if not tensor.is_meta:
                    tensor.data = values
            for tensor, kind in lazy:
                tensor.__class__ = kind

        self.then(back)

    def restore(self, error: BaseException) -> None:
        """Take everything back; what cannot be is named in the error's `.changed` and message."""
        while self._steps:
            with contextlib.suppress(Exception):  # the first error is the one to tell; the other steps matter too
                self._steps.pop()()
        lost, self.lost = self.lost, ()
        if not lost:
            return
        text = f"{len(lost)} tensors of the model were overwritten at least in part; .changed names them."
        error.changed = lost  # type: ignore[attr-defined]
        if isinstance(error, CheckpointError):
            error.args = (f"{error.args[0]} {text}", *error.args[1:])
        elif hasattr(error, "add_note"):
            error.add_note(text)
