"""Refuse what a plan shows not to fit, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from anycard.checkpoint import tensor_bytes
from anycard.errors import CheckpointError, DeviceError, MismatchError
from anycard.tensors import TensorInfo, span_numel
from anycard.torch.reading import Fill, Fills, read_tensor
from anycard.torch.work import Options, Work, final_dtype
from anycard.warning import warn

_MOST = 60  # lines of an error
_ONE_RANK = (
    "The file has one rank's part of each DTensor (torch.save of a sharded model), not the weights: save them by "
    "torch.distributed.checkpoint, or each tensor's full_tensor()."
)


def check(work: Work, options: Options) -> None:
    """Refuse what does not fit; with strict=False, warn of it.

    Raises:
        MismatchError: With the plan.
        CheckpointError: The model is sharded over cards.
        DeviceError: `DataParallel` keeps its model on another card than the one asked for.
    """
    plan = work.plan
    _check_data_parallel(work.model, options)
    _refuse_sharded(work)
    problems = plan.problems()
    nothing = not work.fills and not plan.called and plan.total > 0
    if (problems and options.strict) or nothing or plan.objections:
        raise MismatchError(_refusal(work, problems, nothing), plan=plan, path=plan.path)
    _check_conflicts(work, options)
    if work.idle:
        warn(f"{plan.path}: {work.idle}")
    if problems:
        warn(f"{plan.path}: loaded without what does not fit {plan.model}:\n" + "\n".join(problems))


def _check_data_parallel(model: nn.Module, options: Options) -> None:
    wanted = options.device
    if wanted is None:
        return
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and module.device_ids:
            first = torch.device("cuda", module.device_ids[0])
            if wanted != first:
                raise DeviceError(f"DataParallel keeps its model on {first}, device={str(wanted)!r} was asked for")


def _refuse_sharded(work: Work) -> None:
    for name, tensor in work.model.named_parameters() if work.called or not all(work.fills.plain) else ():
        if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
            raise CheckpointError(
                f"{name} is a DTensor, sharded over cards, which is not filled yet: load before fully_shard or "
                "parallelize_module. The model was not changed.",
                path=work.plan.path,
                name=name,
            )


def _refusal(work: Work, problems: list[str], nothing: bool) -> str:
    plan = work.plan
    verdict = plan.verdict().removeprefix("does not fit: ").removeprefix("fits: ")
    lines = [f"{plan.path} does not fit {plan.model}: {verdict}."]
    if nothing:
        lines[0] = f"{plan.path} does not fit {plan.model}: nothing in it fits (0 of {plan.total} tensors)."
    lines += problems[:_MOST]
    if len(problems) > _MOST:
        lines.append(f"  … and {len(problems) - _MOST} more: print(anycard.plan(path, model)) shows all")
    hints = [f"{work.idle}."] if work.idle else []
    if any(name.endswith("._local_tensor") for name in (*plan.unexpected, *work.match.names)):
        hints.append(_ONE_RANK)
    if work.match.outside and not plan.missing:
        hints.append(f"To take that part alone: key={plan.key!r}.")
    elif plan.nearest:
        hints.append("To mend names: rename=.")
    if not (nothing or plan.objections):
        hints.append("To load what fits: strict=False.")
    return "\n".join([*lines, "  " + " ".join([*hints, "The model was not changed."])])


def _check_conflicts(work: Work, options: Options) -> None:
    own = dict(zip(work.fills.names, work.fills.tensors, strict=True)) if work.conflicts else {}
    for a, first, b, second in work.conflicts:
        if not _agree(first, second, final_dtype(own[a].dtype, first, options.dtype)):
            raise _contradiction(a, b, work)
    for group in _overlapping(work.fills):
        _check_overlap(group, work)


def _agree(first: TensorInfo, second: TensorInfo, dtype: torch.dtype) -> bool:
    """They are the same bytes; of two dtypes, once they are cast to the model's."""
    if first.dtype == second.dtype:
        return tensor_bytes(first) == tensor_bytes(second)
    one, other = (read_tensor(info).to(dtype).reshape(-1).view(torch.uint8) for info in (first, second))
    return torch.equal(one, other)


def _contradiction(a: str, b: str, work: Work) -> MismatchError:
    return MismatchError(
        f"{a} and {b} are one memory in the model, but the file stores two different tensors. "
        f"Untie them in the model, or pick one with only=. The model was not changed.",
        plan=work.plan,
        path=work.plan.path,
    )


def _overlapping(fills: Fills) -> list[list[Fill]]:
    """Tensors that are different views of the same memory, such as a transposed tie."""
    if _plainly_apart(fills):
        return []
    rows = list(fills)
    extents = sorted([(*_extent(fill), index) for index, fill in enumerate(rows)])
    groups: list[list[int]] = []
    within, reach = "", -1
    for memory, start, end, index in extents:
        if memory == within and start < reach:
            groups[-1].append(index)
        else:
            groups.append([index])
        reach = max(reach, end) if memory == within else end
        within = memory
    return [[rows[index] for index in sorted(group)] for group in groups if len(group) > 1]


def _plainly_apart(fills: Fills) -> bool:
    if not all(fills.plain):
        return False
    starts = fills.addresses
    ends = starts + fills.nbytes
    order = np.argsort(starts)
    return bool((ends[order[:-1]] <= starts[order[1:]]).all())


def _extent(fill: Fill) -> tuple[str, int, int]:
    """A memory, and where in it the first element is and the end of the last; the same where it has no memory."""
    tensor = fill.tensor
    if fill.plain:
        start = tensor.data_ptr()
        return "", start, start + tensor.nbytes
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta or not tensor.data_ptr():
        return "", 0, 0
    memory, start = "", tensor.data_ptr()
    if not tensor.is_cpu:  # not every device's pointers are addresses (those of mps are not)
        memory = f"{tensor.device} {tensor.untyped_storage().data_ptr()}"
        start = int(tensor.storage_offset()) * tensor.element_size()
    return memory, start, start + span_numel(tuple(tensor.shape), tuple(tensor.stride())) * tensor.element_size()


def _check_overlap(group: Sequence[Fill], work: Work) -> None:
    """Write the stored values over one another in a copy of the memory, and see whether the first ones stay."""
    first = group[0].tensor.detach()
    memory = first.untyped_storage().clone()  # type: ignore[no-untyped-call]
    views, values = [], []
    for fill in group:
        own = fill.tensor.detach()
        if own.dtype != first.dtype or own.shape != fill.info.shape:
            continue
        view = torch.empty(0, dtype=own.dtype, device=own.device)
        view.set_(memory, own.storage_offset(), own.shape, own.stride())
        values.append(read_tensor(fill.info, fill.name).to(own))
        views.append((view, fill.name))
        view.copy_(values[-1])
    last = views[-1][1] if views else ""
    for (view, name), value in zip(views, values, strict=True):
        if not torch.equal(view, value) and not bool(((view == value) | (view != view)).all()):
            raise _contradiction(name, last, work)
