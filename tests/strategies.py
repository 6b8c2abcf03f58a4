"""Hypothesis strategies: tensors of every dtype and memory layout, state dicts, stacks of wrappers."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex128", "complex64", "complex32", "uint16", "uint32", "uint64",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
DTYPES = tuple(getattr(torch, name) for name in DTYPE_NAMES if hasattr(torch, name))
NOT_IN_SAFETENSORS = {torch.complex128, torch.complex32}
SAFETENSORS_DTYPES = tuple(d for d in DTYPES if d not in NOT_IN_SAFETENSORS)


@st.composite
def dense_tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, most: int = 4) -> torch.Tensor:
    """A contiguous tensor of any bits, also no elements and no dimensions."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=most))
    size = math.prod(shape) * dtype.itemsize
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1) if tensor.dim() > 1 else tensor


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[::2] if tensor.dim() else tensor


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[1:] if tensor.dim() else tensor


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(0).expand(3, *tensor.shape)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _conjugated(tensor: torch.Tensor) -> torch.Tensor:
    """Not of complex32: torch resolves that by way of float32, which makes a signalling NaN a quiet one."""
    return tensor.conj() if tensor.is_complex() and tensor.dtype != torch.complex32 else tensor


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    """The imaginary part of a conjugate: the only way to a tensor with the negative bit."""
    return tensor.conj().imag if tensor.dtype in (torch.complex64, torch.complex128) else tensor


def _parameter(tensor: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t, _transposed, _strided, _sliced, _expanded, _channels_last, _conjugated, _negated,
)  # fmt: skip


# Whether conjugated or negated views are drawn that torch resolves into another order than row-major.
LAZY_OUT_OF_ORDER = True


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    resolved = tensor.resolve_conj().resolve_neg()
    return tensor if LAZY_OUT_OF_ORDER or resolved is tensor or resolved.is_contiguous() else resolved.contiguous()


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
    """A tensor that is some view of some memory."""
    tensor = draw(dense_tensors(dtypes))
    for layout in draw(st.lists(st.sampled_from(LAYOUTS), max_size=2)):
        tensor = layout(tensor)
    return _settled(tensor) if tensor.dtype in dtypes else draw(dense_tensors(dtypes))


NAMES = st.one_of(
    st.sampled_from(
        [
            "weight",
            "0.weight",
            "layer1.0.conv.weight",
            "_orig",
            "données.poids",
            "权重",
            "a b",
            "a/b",
            "",
            "😀",
            ".",
            "a.",
        ]
    ),
    st.text(max_size=6).filter(lambda s: s.isprintable() and s != "pt"),  # "pt" has a test of its own
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=5),
    st.binary(max_size=5), st.lists(st.integers(0, 9), max_size=3), st.tuples(st.integers(), st.text(max_size=2)),
)  # fmt: skip


@st.composite
def state_dicts(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, plain: bool = False) -> dict[str, Any]:
    """A flat state dict: views, ties and shared storages among its tensors; maybe plain values beside."""
    held = draw(st.lists(tensors(dtypes), min_size=1, max_size=5))
    first = held[0]
    kin = draw(st.sampled_from(["none", "tied", "view", "parameter"]))
    if kin == "tied":
        held.append(first)
    elif kin == "view":
        held.append(_sliced(first))
    elif kin == "parameter" and not first.is_conj() and not first.is_neg():
        held.append(_parameter(first))
    names = draw(st.lists(NAMES, min_size=len(held), max_size=len(held), unique=True))
    state: dict[str, Any] = dict(zip(names, held, strict=True))
    if plain:
        state |= {f"plain {i}": value for i, value in enumerate(draw(st.lists(PLAIN, max_size=3)))}
    return OrderedDict(state) if draw(st.booleans()) else state


@st.composite
def nested_states(draw: st.DrawFn) -> dict[Any, Any]:
    """Dicts, OrderedDicts and lists of tensors and plain values, some levels deep."""
    leaves = st.one_of(tensors(), PLAIN)
    keys = st.one_of(st.text("abcxyz_é ", min_size=1, max_size=4), st.integers(0, 5))
    inner = st.recursive(
        leaves,
        lambda below: st.one_of(
            st.dictionaries(keys, below, max_size=3), st.dictionaries(keys, below, max_size=3).map(OrderedDict),
            st.lists(below, max_size=2),
        ),
        max_leaves=8,
    )  # fmt: skip
    return draw(st.dictionaries(st.text("abcxyz_", min_size=1, max_size=4), inner, min_size=1, max_size=3))


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile wraps at once and compiles on the first call only."""
    return torch.compile(model)  # type: ignore[return-value]


def averaged(model: nn.Module) -> nn.Module:
    """An average of the model, begun long ago."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = AveragedModel(model)
    wrapped.n_averaged.fill_(7)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": averaged,
    "checkpointed": checkpoint_wrapper,
    "offloaded": offload_wrapper,
}
# Wrappers that leave no state of their own in the file: the same bytes as the bare model.
STATELESS = tuple(name for name in WRAPPERS if name != "averaged")


# Activation wrappers hide their segment in the state dict; whether anything may be wrapped below them.
BELOW_ACTIVATION = True


def wrapped(model: nn.Module, stack: list[str]) -> nn.Module:
    """The model in these wrappers, the innermost first."""
    for name in stack:
        if name == "compiled" and hasattr(model, "get_compiler_config"):  # torch.compile cannot, twice
            continue
        model = WRAPPERS[name](model)
    return model


def _possible(plan: dict[str, list[str]]) -> bool:
    """No activation wrapper around another wrapper, unless that is tried, too."""
    hiding = {"checkpointed", "offloaded"}
    for path, stack in plan.items():
        if hiding & set(stack[1:]):
            return False
        inside = [p for p in plan if p != path and (not path or p.startswith(path + "."))]
        if hiding & set(stack) and inside:
            return False
    return True


@st.composite
def wrappings(draw: st.DrawFn, names: tuple[str, ...] = tuple(WRAPPERS)) -> dict[str, list[str]]:
    """Which stack of wrappers goes around which of the paths of `Nested` ("" is the model itself)."""
    paths = draw(st.lists(st.sampled_from(NESTED_PATHS), unique=True, max_size=3))
    plan = {path: draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)) for path in paths}
    assume(BELOW_ACTIVATION or _possible(plan))
    return plan


class Nested(nn.Module):
    """Submodules at two depths; one is called `module`, as nobody should, and as people do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.module = nn.Sequential(nn.Linear(3, 2, bias=False))
        self.head = nn.Linear(2, 2)


class Pair(nn.Module):
    """Two networks, as a GAN has them; their inner parts are what people wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Nested()
        self.critic = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


class OnlyModule(nn.Module):
    """Its one child is called `module`: the names alone look like DataParallel's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


NESTED_PATHS = ("", "block", "block.0", "module", "module.0", "head")


def wrap_inside(model: nn.Module, plan: dict[str, list[str]]) -> nn.Module:
    """Wrap submodules, the deepest first, then the model itself."""
    for path in sorted(plan, key=len, reverse=True):
        if path:
            parent, _, name = path.rpartition(".")
            setattr_child(model.get_submodule(parent), name, wrapped(model.get_submodule(path), plan[path]))
    return wrapped(model, plan.get("", []))


def setattr_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Replace a child by its name, also a numbered one."""
    parent._modules[name] = child
