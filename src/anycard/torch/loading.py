"""`load` and `plan`: plan, check, allocate, call, read, fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import nn

from anycard.checkpoint import Checkpoint, open_checkpoint
from anycard.errors import CheckpointError, ChoiceError, DeviceError, MismatchError
from anycard.limits import DEFAULT
from anycard.plans.load_plan import LoadPlan
from anycard.plans.matching import Only, Rename
from anycard.progress import Progress
from anycard.torch.building import Built, build
from anycard.torch.devices import find_device
from anycard.torch.filling import fill
from anycard.torch.planning import Options, Work, make_work
from anycard.torch.reading import read_tensor
from anycard.warning import warn

Path = str | os.PathLike[str] | BinaryIO


def load(
    path: Path,
    model: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    strict: bool = True,
    key: str | None = None,
    member: str | None = None,
    rename: Rename | None = None,
    only: Only | None = None,
    allow: str | Sequence[str] = (),
    verify: bool | None = None,
    progress: Progress = None,
) -> Any:
    """Load a checkpoint into a model, however either is wrapped and wherever either stood.

    Args:
        path: A path or an open binary file, of any format that anycard reads.
        model: An `nn.Module` (filled in place), a callable that builds one (never initialised), a dict
            of objects that have `load_state_dict`, or None (the file holds a whole model).
        device: Where the model ends up. None keeps an existing model's devices, else the CPU.
        dtype: For floating-point tensors only; "auto" keeps the file's.
        strict: False loads what fits, and warns of the rest.
        key: Which state dict in the file.
        rename: A mapping, a list of (regex, replacement), or a function, on canonical names.
        only: Globs, a module name, or a function: which of the model's tensors.
        allow: Classes or modules that may be imported to rebuild a whole model.
        verify: True checks all checksums before an existing model is touched; False none.
        progress: True for a bar on stderr, or a function of (done, total) bytes.

    Returns:
        The module, filled; or the dict, with what else the file holds.

    Raises:
        MismatchError: The file does not fit; `.plan` says how. The model is as it was.
        FormatError: Damaged, or no checkpoint.
        UntrustedError: A whole model needs classes that `allow` does not name.
        DeviceError: The device is not there.
        ChoiceError: Several state dicts could be meant.
    """
    options = Options(None if device is None else find_device(device), _dtype(dtype), strict, key, rename, only)
    with open_checkpoint(path) as ckpt:
        if verify:
            _verify(ckpt)
        if model is None:
            return _whole(ckpt, allow, options)
        if isinstance(model, Mapping):
            return _into_objects(ckpt, model, options, verify, progress)
        if isinstance(model, nn.Module):
            return _into(ckpt, model, options, None, verify, progress)
        if not callable(model):
            raise TypeError(f"model must be an nn.Module, a callable or a dict, not {type(model).__name__}")
        built = build(model)
        return _into(ckpt, built.model, options, built, verify, progress)


def plan(
    path: Path,
    model: Any,
    *,
    device: Any = None,
    dtype: Any = None,
    strict: bool = True,
    key: str | None = None,
    member: str | None = None,
    rename: Rename | None = None,
    only: Only | None = None,
) -> LoadPlan:
    """What `load` would do with the same arguments; nothing is touched, no tensor is read.

    Raises:
        ChoiceError: Several state dicts fit equally well.
        FormatError: Damaged, or no checkpoint.
    """
    options = Options(None if device is None else find_device(device), _dtype(dtype), strict, key, rename, only)
    with open_checkpoint(path) as ckpt:
        module = model if isinstance(model, nn.Module) else build(model).model
        return make_work(ckpt, module, options).plan


def _dtype(dtype: Any) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype  # type: ignore[no-any-return]
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if isinstance(named, torch.dtype):
        return named
    raise ValueError(f"dtype must be a torch.dtype, its name, or 'auto', not {dtype!r}")


def _verify(ckpt: Checkpoint) -> None:
    from anycard.operations.verification import verify_checkpoint

    report = verify_checkpoint(ckpt)
    if not report.ok:
        raise_damage(ckpt, report.damaged)


def raise_damage(ckpt: Checkpoint, damaged: Sequence[str]) -> None:
    """FormatError that names the damaged tensors."""
    from anycard.errors import FormatError

    names = ", ".join(damaged[:10])
    raise FormatError(f"{len(damaged)} damaged: {names}. Nothing was changed.", path=ckpt.path, name=damaged[0])


def _into(
    ckpt: Checkpoint,
    model: nn.Module,
    options: Options,
    built: Built | None,
    verify: bool | None,
    progress: Progress,
) -> nn.Module:
    _check_data_parallel(model, options)
    work = make_work(ckpt, model, options)
    check(work, options)
    fresh = built is not None
    if built is not None:
        built.finish([t.tensor for t, _ in work.fills] if not work.plan.called else [])
    fill(work, options, verify=verify if verify is not None else fresh, fresh=fresh, progress=progress)
    return model


def _check_data_parallel(model: nn.Module, options: Options) -> None:
    wanted = options.device
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and module.device_ids and wanted is not None:
            first = torch.device("cuda", module.device_ids[0])
            if wanted.type != "cuda" or (wanted.index or 0) != first.index:
                raise DeviceError(f"DataParallel keeps its model on {first}, device={str(wanted)!r} was asked for")


def check(work: Work, options: Options) -> None:
    """Refuse what does not fit; with strict=False, warn of it.

    Raises:
        MismatchError: With the plan.
    """
    plan = work.plan
    unknown = _meta_leftovers(work)
    problems = [*plan.problems(), *(f"  unknown     {name}: {_META}" for name in unknown)]
    nothing = not work.fills and not plan.called
    if (problems and options.strict) or nothing:
        raise MismatchError(_refusal(work, problems, nothing), plan=plan, path=plan.path)
    _check_conflicts(work)
    if problems:
        warn(f"{plan.path}: loaded without what does not fit {plan.model}:\n" + "\n".join(problems))


_META = "on the meta device, and the file does not hold it; give a factory instead of the model"


def _meta_leftovers(work: Work) -> list[str]:
    from anycard.torch.modules import walk

    names = []
    for _, canonical, module in walk(work.model):
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                names.append(f"{canonical}.{name}" if canonical else name)
    return names


def _refusal(work: Work, problems: list[str], nothing: bool) -> str:
    plan = work.plan
    verdict = plan.verdict().removeprefix("does not fit: ")
    lines = [f"{plan.path} does not fit {plan.model}: {verdict}."]
    if nothing:
        lines[0] = f"{plan.path} does not fit {plan.model}: nothing in it fits (0 of {plan.total} tensors)."
    lines += problems[:60]
    if len(problems) > 60:
        lines.append(f"  … and {len(problems) - 60} more: print(anycard.plan(path, model)) shows all")
    hint = "To mend names: rename=." if plan.nearest else ""
    if work.match.outside and not plan.missing:
        hint = f"To take that part alone: key={plan.key!r}."
    tail = "" if nothing else " To load what fits: strict=False."
    lines.append(f"  {hint}{tail} The model was not changed.".replace("   ", "  "))
    return "\n".join(lines)


def _check_conflicts(work: Work) -> None:
    from anycard.checkpoint import tensor_bytes

    for a, first, b, second in work.conflicts:
        if first.dtype != second.dtype or tensor_bytes(first) != tensor_bytes(second):
            raise MismatchError(
                f"{a} and {b} are one tensor in the model, but the file stores two different ones. "
                f"Untie them in the model, or pick one with only=. The model was not changed.",
                plan=work.plan,
                path=work.plan.path,
            )


def _whole(ckpt: Checkpoint, allow: str | Sequence[str], options: Options) -> Any:
    from anycard.torch.rebuilding import rebuild_model

    found = [c for c in ckpt.state_dicts if c.canonical is not None]
    if not found:
        raise ChoiceError(
            f"{ckpt.path} holds weights, not a whole model: give the model or a callable that builds it, "
            "anycard.load(path, model), or take the weights with anycard.read(path)",
            path=ckpt.path,
        )
    model = rebuild_model(ckpt, allow, options.key)
    if options.device is not None:
        model = model.to(options.device)
    if isinstance(options.dtype, torch.dtype):
        model = model.to(options.dtype)
    return model


def _into_objects(
    ckpt: Checkpoint,
    objects: Mapping[str, Any],
    options: Options,
    verify: bool | None,
    progress: Progress,
) -> dict[str, Any]:
    """Fill a dict of objects, the mirror of `save`; gives them and what else the file holds."""
    tree = ckpt.tree
    if not isinstance(tree, Mapping):
        raise ChoiceError(f"{ckpt.path} holds no dict of objects, as anycard.save of a dict writes", path=ckpt.path)
    absent = [name for name in objects if name not in tree]
    if absent:
        raise MismatchError(f"{ckpt.path} has no {absent}; it has {sorted(map(str, tree))}", path=ckpt.path)
    works = []
    for name, target in objects.items():
        if isinstance(target, nn.Module):
            mine = Options(options.device, options.dtype, options.strict, name, options.rename, options.only)
            work = make_work(ckpt, target, mine)
            check(work, mine)
            works.append((work, mine))
        elif not hasattr(target, "load_state_dict"):
            raise TypeError(f"{name} is a {type(target).__name__}, which has no load_state_dict")
    data = {str(name): materialise(value) for name, value in tree.items() if not _is_module(objects.get(name))}
    for work, mine in works:
        fill(work, mine, verify=bool(verify), fresh=False, progress=progress)
    _load_others(objects, data)
    return {**data, **objects}


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _load_others(objects: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    done: list[tuple[Any, Any]] = []
    import copy

    for name, target in objects.items():
        if isinstance(target, nn.Module):
            continue
        before = copy.deepcopy(target.state_dict()) if hasattr(target, "state_dict") else None
        try:
            target.load_state_dict(data[name])
        except Exception as error:
            for other, state in (*done, (target, before)):
                if state is not None:
                    other.load_state_dict(state)
            raise CheckpointError(f"{name} would not load its state: {error}", name=name) from error
        done.append((target, before))


def materialise(value: Any) -> Any:
    """Plain data with tensors read; stubs become dicts that name their class."""
    from anycard.checkpoint import plain
    from anycard.pickles.stubs import Inert
    from anycard.tensors import TensorInfo

    if isinstance(value, TensorInfo):
        return read_tensor(value, limits=DEFAULT)
    if isinstance(value, Mapping):
        return {k: materialise(v) for k, v in value.items()}
    if isinstance(value, list):
        return [materialise(v) for v in value]
    if isinstance(value, tuple):
        return tuple(materialise(v) for v in value)
    return plain(value) if isinstance(value, (Inert, type)) else value


Factory = Callable[[], nn.Module]
