"""The wrapper table, and canonical names where no model can be asked. A new wrapper is one row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Wrapper(NamedTuple):
    """A module class that only wraps another.

    Attributes:
        path: The class, `package.module.Class`.
        child: The attribute that holds the wrapped module, and so the segment in names.
        own: Names of the wrapper's own persistent buffers.
    """

    path: str
    child: str
    own: tuple[str, ...] = ()


WRAPPERS = (
    Wrapper("torch.nn.parallel.data_parallel.DataParallel", "module"),
    Wrapper("torch.nn.parallel.distributed.DistributedDataParallel", "module"),
    Wrapper("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod"),
    Wrapper("torch.optim.swa_utils.AveragedModel", "module", ("n_averaged",)),
    Wrapper("torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel", "_fsdp_wrapped_module"),
    Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
    Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.OffloadWrapper",
        "_checkpoint_wrapped_module",
    ),
    Wrapper("apex.parallel.distributed.DistributedDataParallel", "module"),
    Wrapper("deepspeed.runtime.engine.DeepSpeedEngine", "module"),
    Wrapper("lightning.fabric.wrappers._FabricModule", "_forward_module"),
    Wrapper("lightning_fabric.wrappers._FabricModule", "_forward_module"),
)  # fmt: skip
BY_PATH: dict[str, Wrapper] = {row.path: row for row in WRAPPERS}
OWN_NAMES = frozenset(name for row in WRAPPERS for name in row.own)
# Segments that are nobody's own names: they go wherever they stand.
SEGMENTS = frozenset(row.child for row in WRAPPERS if row.child != "module")


def wrapper_of(paths: Iterable[str]) -> Wrapper | None:
    """The table's row for a class, given the paths of the class and its bases."""
    return next((BY_PATH[path] for path in paths if path in BY_PATH), None)


def without_segments(name: str) -> str:
    """The name without the segments that are nobody's own."""
    if "_" not in name or not any(segment in name for segment in SEGMENTS):
        return name
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)


def has_no_segments(names: Iterable[str]) -> bool:
    """No wrapper's segment in any name, told by one look at all of them."""
    text = f".{'.'.join(names)}."
    return not any(f".{child}." in text for child in {row.child for row in WRAPPERS})


def removable(names: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Paths of nodes whose only child is `module`: there, a wrapper may stand.

    A wrapper's own buffers (`n_averaged`) do not count as children.
    """
    children: dict[tuple[str, ...], set[str]] = {}
    for parts in names:
        for depth, part in enumerate(parts):
            if part == "module":
                children.setdefault(parts[:depth], set())
    for parts in names:
        for depth, part in enumerate(parts):
            if parts[:depth] in children and not (depth == len(parts) - 1 and part in OWN_NAMES):
                children[parts[:depth]].add(part)
    return {node for node, held in children.items() if held == {"module"}}


def outer_prefix(names: Iterable[str]) -> str:
    """The prefix of `module.` (or several) that every name carries; "" where one lacks it.

    A wrapper's own buffers at that level may lack it.
    """
    rest = list(names)
    prefix = ""
    while True:
        weights = [name for name in rest if name not in OWN_NAMES]
        if not weights or not all(name.startswith("module.") for name in weights):
            return prefix
        prefix += "module."
        rest = [name[len("module.") :] for name in weights]
