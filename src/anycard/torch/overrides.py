"""What torch's functions do to a tensor, by name, for the modes that watch a model being built or loaded."""

from __future__ import annotations

from typing import Any

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
# They give a view of it, always (`reshape` and `flatten` may copy).
VIEWS = frozenset(
    """
    data detach view view_as t T mT transpose permute unsqueeze squeeze __getitem__ narrow select expand chunk
    split unbind as_strided diagonal swapaxes movedim
    """.split()
)
# They overwrite every element with what depends on plain values only.
FILLS = frozenset(
    """
    zero_ fill_ uniform_ normal_ log_normal_ exponential_ cauchy_ geometric_ bernoulli_ random_
    """.split()
)
# They change every element by plain values only.
ARITHMETIC = frozenset(
    """
    mul_ add_ sub_ div_ clamp_ clamp_min_ clamp_max_ erfinv_ neg_ pow_ sqrt_ exp_
    """.split()
)


def short_name(func: Any) -> str:
    """`copy_`, `shape`, `data`: a function's name, or the attribute that a getter or setter stands for."""
    name = getattr(func, "__name__", "") or ""
    if name in ("__get__", "__set__"):
        owner = getattr(func, "__self__", None)
        name = getattr(owner, "__name__", "") or (resolve_name(func) or "").split(".")[-2]
    return str(name)
