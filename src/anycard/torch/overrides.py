"""What torch's functions do to a tensor, by name, for the modes that watch a model being built or loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import resolve_name

# They look at a tensor, not at its values.
METADATA = frozenset(
    """
    dim size shape dtype device numel nelement is_floating_point is_complex requires_grad requires_grad_ ndim
    stride is_contiguous __len__ element_size layout is_cuda is_cpu is_meta is_sparse is_quantized grad
    grad_fn is_leaf storage_offset names __hash__ register_hook _version is_nested is_mkldnn is_xpu is_mps
    _backward_hooks retains_grad output_nr itemsize nbytes is_signed _set_grad_enabled
    """.split()
)
# They give a view of it, where all else that they are given is numbers (`reshape` and `flatten` may copy).
VIEWS = frozenset(
    """
    data detach view t T mT transpose permute unsqueeze squeeze __getitem__ narrow select expand chunk
    split unbind as_strided diagonal swapaxes movedim
    """.split()
)
# They overwrite every element with one draw or another from a generator.
DRAWS = frozenset(
    """
    uniform_ normal_ log_normal_ exponential_ cauchy_ geometric_ bernoulli_ random_
    """.split()
)
# They change every element by plain values only; torch.nn.init's draw nothing either.
ARITHMETIC = frozenset(
    """
    zero_ fill_ mul_ add_ sub_ div_ clamp_ clamp_min_ clamp_max_ erfinv_ neg_ pow_ sqrt_ exp_
    zeros_ ones_ constant_ eye_ dirac_
    """.split()
)


def gives_view(name: str, values: Iterable[Any]) -> bool:
    """Whether one of VIEWS gives a view, by what it is given beside the tensor: `t[tensor]` and `t[list]` copy."""
    if name == "__getitem__":
        return all(_is_basic(value) for value in values)
    return all(isinstance(value, _PLAIN) or _are_numbers(value) for value in values)


def _is_basic(index: Any) -> bool:
    if isinstance(index, tuple):
        return all(_is_basic(part) for part in index)
    if isinstance(index, slice):
        return all(part is None or type(part) is int for part in (index.start, index.stop, index.step))
    return index is None or index is ... or type(index) is int


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(part) is int for part in value)


_PLAIN = (int, str, type(None), torch.dtype)


def short_name(func: Any) -> str:
    """`copy_`, `shape`, `data`: a function's name, or the attribute that a getter or setter stands for."""
    name = getattr(func, "__name__", "") or ""
    if name in ("__get__", "__set__"):
        owner = getattr(func, "__self__", None)
        name = getattr(owner, "__name__", "") or (resolve_name(func) or "").split(".")[-2]
    return str(name)
