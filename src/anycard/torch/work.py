"""What planning gives and filling takes: the plan, and the live things that it speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from anycard.plans.load_plan import LoadPlan
from anycard.plans.matching import Match, Only, Rename
from anycard.tensors import DTYPES, TensorInfo
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.reading import Fills
from anycard.torch.self_loading import Trace
from anycard.torch.survey import Target


@dataclass(frozen=True)
class Options:
    """The arguments of `load` and `plan` that shape a plan."""

    device: torch.device | None = None
    dtype: torch.dtype | str | None = None
    strict: bool = True
    key: str | None = None
    rename: Rename | None = None
    only: Only | None = None
    mmap: bool = False


@dataclass
class OwnLoader:
    """A module that loads itself: traced, or to be called with real tensors.

    Attributes:
        name, live: Its canonical path and its path in the module tree.
        given: Names in the module tree -> the stored tensors that it is given.
        metadata: Module paths in the tree -> what `_metadata` says of them.
        spared: Targets that keep their values, whatever the module does.
    """

    module: nn.Module
    name: str
    live: str
    given: dict[str, TensorInfo]
    metadata: dict[str, dict[str, Any]]
    trace: Trace
    spared: Sequence[Target] = ()


@dataclass
class Work:
    """A plan, and the live things that it speaks of.

    Attributes:
        fills: One for each distinct tensor of the model.
        counters: Batch norms' counters that old files lack; they stay, or start at 0.
        called: Modules that load themselves and have to be called with real tensors.
        hooked: Modules whose own hooks run after the load.
        extras: Module, its extra state's name, and the stored extra state.
        conflicts: Tied names for which the file stores two tensors.
        wrapper_state: A wrapper's own counter -> its new value.
        idle: That `rename=` changes no name, or "".
    """

    plan: LoadPlan
    model: nn.Module
    match: Match
    fills: Fills = field(default_factory=Fills)
    counters: list[Target] = field(default_factory=list)
    called: list[OwnLoader] = field(default_factory=list)
    hooked: list[nn.Module] = field(default_factory=list)
    extras: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    conflicts: list[tuple[str, TensorInfo, str, TensorInfo]] = field(default_factory=list)
    wrapper_state: list[tuple[Target, int]] = field(default_factory=list)
    idle: str = ""


def final_dtype(own: torch.dtype, info: TensorInfo | None, asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype that a tensor ends up with; `dtype=` counts for floating-point tensors only.

    Args:
        info: The stored tensor; None where there is none of that name.
    """
    if asked == "auto" and info is not None:
        return TO_TORCH[info.dtype] if own.is_floating_point and DTYPES[info.dtype].kind == "float" else own
    if isinstance(asked, torch.dtype) and own.is_floating_point:
        return asked
    return own


_KINDS = {"bool": 0, "int": 1, "float": 2, "complex": 3}


def loses_kind(stored: str, own: str) -> bool:
    """A cast would lose what the values are: float into integer, complex into real."""
    if (stored, own) == ("uint8", "bool"):
        return False  # a mask from before torch 1.2, where it became a dtype of its own
    have, want = _KINDS.get(DTYPES[stored].kind), _KINDS.get(DTYPES[own].kind)
    return have is None or want is None or have > want
