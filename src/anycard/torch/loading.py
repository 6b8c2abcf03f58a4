"""`load` and `plan`: plan, check, allocate, call, read, fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, TypeVar, overload

import torch
from torch import nn

from anycard.arguments import allowed, refuse_odd
from anycard.checkpoint import Checkpoint, open_checkpoint
from anycard.collection import uncollected
from anycard.errors import ChoiceError, FormatError
from anycard.plans.load_plan import LoadPlan
from anycard.plans.matching import Only, Rename, refuse_odd_rules
from anycard.progress import Progress, counting
from anycard.torch.building import Built, build
from anycard.torch.checking import check
from anycard.torch.devices import find_device
from anycard.torch.filling import fill
from anycard.torch.planning import make_work
from anycard.torch.undo import Undo
from anycard.torch.work import Options, Work

if TYPE_CHECKING:
    from typing_extensions import Unpack

Path = str | os.PathLike[str] | BinaryIO
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class _Given(TypedDict, total=False):
    """What `load` takes beside the file and the model."""

    device: Any
    dtype: Any
    strict: bool
    key: str | None
    member: str | None
    rename: Rename | None
    only: Only | None
    allow: str | Sequence[str] | None
    verify: bool | None
    mmap: bool
    progress: Progress


@overload
def load(path: Path, model: None = None, **given: Unpack[_Given]) -> nn.Module: ...
@overload
def load(path: Path, model: M, **given: Unpack[_Given]) -> M: ...
@overload
def load(path: Path, model: Mapping[str, Any], **given: Unpack[_Given]) -> dict[str, Any]: ...
@overload
def load(path: Path, model: list[Any], **given: Unpack[_Given]) -> list[Any]: ...
@overload
def load(path: Path, model: Callable[..., M], **given: Unpack[_Given]) -> M: ...
@overload
def load(path: Path, model: T, **given: Unpack[_Given]) -> T: ...
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
    allow: str | Sequence[str] | None = (),
    verify: bool | None = None,
    mmap: bool = False,
    progress: Progress = None,
) -> Any:
    """Load a checkpoint into a model, however either is wrapped and wherever either stood.

    Args:
        path: A path or an open binary file, of any format that anycard reads.
        model: An `nn.Module` (filled in place), a callable that builds one (never initialised), an
            object that has `load_state_dict`, a dict or list of such objects (or of dicts and lists of them), or
            None (the file holds a whole model).
        device: Where the model ends up. None keeps an existing model's devices, else the CPU.
        dtype: For floating-point tensors only; "auto" keeps the file's.
        strict: False loads what fits, and warns of the rest.
        key: Which state dict in the file.
        member: Which file, where this one holds checkpoints inside.
        rename: A mapping, a list of (regex, replacement), or a function, on canonical names.
        only: Globs, a module name, or a function: which of the model's tensors.
        allow: Classes or modules that may be imported to rebuild a whole model.
        verify: True checks all checksums before an existing model is touched; False none.
        mmap: Map the file instead of reading it, where its bytes lie as the model needs them on the CPU: pages are
            read when first touched. The file must stay as it is: one that is cut short meanwhile ends the
            process (SIGBUS), and one on a network file system may. No checksum is looked at, but for verify=True.
        progress: True for a bar on stderr, or a function of (done, total) bytes.

    Returns:
        The module or the object, filled; or the dict, with what else the file holds.

    Raises:
        MismatchError: The file does not fit; `.plan` says how. The model is as it was.
        FormatError: Damaged, or no checkpoint.
        UntrustedError: A whole model needs classes that `allow` does not name.
        DeviceError: The device is not there.
        ChoiceError: Several state dicts could be meant.
    """
    refuse_odd(key=key, member=member, progress=progress)
    options = _options(device, dtype, strict, key, rename, only, mmap)
    with uncollected():  # what a load makes beside the model is gone before the collector looks again
        return _load(path, member, model, options, allowed(allow), verify, progress)


def _load(
    path: Path,
    member: str | None,
    model: Any,
    options: Options,
    allow: tuple[str, ...],
    verify: bool | None,
    progress: Progress,
) -> Any:
    with open_checkpoint(path, member=member) as ckpt:
        if verify:
            _verify(ckpt)
        if model is None:
            return _whole(ckpt, allow, options, progress)
        if _are_objects(model):
            from anycard.torch.objects import load_objects  # here and below: a first load imports what it needs

            return load_objects(ckpt, model, options, verify, progress)
        work, built = _planned(ckpt, model, options)
        check(work, options)
        if built is not None:
            built.finish(_filled(work))
        with nullcontext() if built is not None else Undo() as undo, counting(progress, work.plan.nbytes) as done:
            fill(work, options, verify=verify, undo=undo, done=done)
        return work.model


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

    Args:
        path, model, …: As `load` takes them; of a dict of objects, one model at a time.

    Raises:
        ChoiceError: Several state dicts fit equally well.
        FormatError: Damaged, or no checkpoint.
    """
    if _are_objects(model):
        raise TypeError("plan takes one model: of a dict of objects plan each by itself, with its name there as key=")
    refuse_odd(key=key, member=member)
    options = _options(device, dtype, strict, key, rename, only)
    with uncollected(), open_checkpoint(path, member=member) as ckpt:
        return _planned(ckpt, model, options)[0].plan


def _planned(ckpt: Checkpoint, model: Any, options: Options) -> tuple[Work, Built | None]:
    """The plan for a model, or for the model that a callable builds."""
    if isinstance(model, nn.Module):
        return make_work(ckpt, model, options), None
    if not callable(model):
        raise TypeError(f"model must be an nn.Module, a callable or a dict, not {type(model).__name__}")
    built = build(model)
    return make_work(ckpt, built.model, options), built


def _are_objects(model: object) -> bool:
    """A dict or list of objects, or one that is no module but loads a state dict."""
    if isinstance(model, (nn.Module, type)):
        return False
    return isinstance(model, (Mapping, list, tuple)) or callable(getattr(model, "load_state_dict", None))


def _filled(work: Work) -> Sequence[torch.Tensor]:
    """The tensors that need no initialisation: the file gives every one of their elements."""
    return [] if work.called else work.fills.tensors


def _options(
    device: Any, dtype: Any, strict: bool, key: str | None, rename: Rename | None, only: Only | None,
    mmap: bool = False,
) -> Options:  # fmt: skip
    refuse_odd_rules(rename, only)
    where = None if device is None else find_device(device)
    return Options(where, _dtype(dtype), strict, key, rename, only, mmap)


def _dtype(dtype: Any) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype  # type: ignore[no-any-return]
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if isinstance(named, torch.dtype):
        return named
    raise ValueError(f"dtype must be a torch.dtype, its name, or 'auto', not {dtype!r}")


def _verify(ckpt: Checkpoint) -> None:
    from anycard.operations.verification import verify_checkpoint

    damaged = verify_checkpoint(ckpt).damaged
    if damaged:
        names = ", ".join(damaged[:10])
        raise FormatError(f"{len(damaged)} damaged: {names}. Nothing was changed.", path=ckpt.path, name=damaged[0])


def _whole(ckpt: Checkpoint, allow: tuple[str, ...], options: Options, progress: Progress) -> Any:
    found = [c for c in ckpt.state_dicts if c.canonical is not None]
    if not found:
        raise ChoiceError(
            f"{ckpt.path} holds weights, not a whole model: give the model or a callable that builds it, "
            "anycard.load(path, model), or take the weights with anycard.read(path)",
            path=ckpt.path,
        )
    if options.rename is not None or options.only is not None:
        raise TypeError("rename= and only= are for loading into a model; a whole model comes as it was saved")
    from anycard.torch.rebuilding import rebuild_model

    model = rebuild_model(ckpt, allow, options.key, progress)
    if options.device is not None:
        model = model.to(options.device)
    dtype = options.dtype
    if isinstance(dtype, torch.dtype):  # `to` would cast complex tensors as well
        model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # type: ignore[no-untyped-call]
    return model
