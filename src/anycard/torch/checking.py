"""Refuse what a plan shows not to fit, before anything is changed."""

from __future__ import annotations

import torch
from torch import nn

from anycard.checkpoint import tensor_bytes
from anycard.errors import DeviceError, MismatchError
from anycard.torch.planning import Options, Work
from anycard.warning import warn

_MOST = 60  # lines of an error


def check(work: Work, options: Options) -> None:
    """Refuse what does not fit; with strict=False, warn of it.

    Raises:
        MismatchError: With the plan.
        DeviceError: `DataParallel` keeps its model on another card than the one asked for.
    """
    plan = work.plan
    _check_data_parallel(work.model, options)
    problems = plan.problems()
    nothing = not work.fills and not plan.called and plan.total > 0
    if (problems and options.strict) or nothing:
        raise MismatchError(_refusal(work, problems, nothing), plan=plan, path=plan.path)
    _check_conflicts(work)
    if problems:
        warn(f"{plan.path}: loaded without what does not fit {plan.model}:\n" + "\n".join(problems))


def _check_data_parallel(model: nn.Module, options: Options) -> None:
    wanted = options.device
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and module.device_ids and wanted is not None:
            first = torch.device("cuda", module.device_ids[0])
            if wanted.type != "cuda" or (wanted.index or 0) != first.index:
                raise DeviceError(f"DataParallel keeps its model on {first}, device={str(wanted)!r} was asked for")


def _refusal(work: Work, problems: list[str], nothing: bool) -> str:
    plan = work.plan
    verdict = plan.verdict().removeprefix("does not fit: ").removeprefix("fits: ")
    lines = [f"{plan.path} does not fit {plan.model}: {verdict}."]
    if nothing:
        lines[0] = f"{plan.path} does not fit {plan.model}: nothing in it fits (0 of {plan.total} tensors)."
    lines += problems[:_MOST]
    if len(problems) > _MOST:
        lines.append(f"  … and {len(problems) - _MOST} more: print(anycard.plan(path, model)) shows all")
    hints = []
    if work.match.outside and not plan.missing:
        hints.append(f"To take that part alone: key={plan.key!r}.")
    elif plan.nearest:
        hints.append("To mend names: rename=.")
    if not nothing:
        hints.append("To load what fits: strict=False.")
    return "\n".join([*lines, "  " + " ".join([*hints, "The model was not changed."])])


def _check_conflicts(work: Work) -> None:
    for a, first, b, second in work.conflicts:
        if first.dtype != second.dtype or tensor_bytes(first) != tensor_bytes(second):
            raise MismatchError(
                f"{a} and {b} are one tensor in the model, but the file stores two different ones. "
                f"Untie them in the model, or pick one with only=. The model was not changed.",
                plan=work.plan,
                path=work.plan.path,
            )
