"""Carry out a plan on live tensors, in the order that makes a failure harmless.

New memory is read before anything is changed; modules that load themselves are called; direct reads into
place come next; then new memory takes its place, and what belongs to the model's own code comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from anycard.errors import naming
from anycard.limits import DEFAULT, Limits
from anycard.tensors import TensorInfo, is_dense
from anycard.torch.calling import Made, call_loaders, check_extras, run_post_hooks, set_extras
from anycard.torch.devices import move
from anycard.torch.dtypes import PLAIN, is_plain
from anycard.torch.mapping import Mappings
from anycard.torch.modules import walk
from anycard.torch.reading import Fill, Fills, prepare
from anycard.torch.undo import Undo
from anycard.torch.work import Options, Work, final_dtype


@dataclass
class _Places:
    """Where the stored tensors go.

    Attributes:
        new: Fresh memory, to be put in the place of a tensor that cannot be written as it is.
        old: By `id` of such a tensor: the tensor and its fresh memory.
        inplace: Tensors that are written where they are.
        mapped: Bytes of what lies over the file's own pages.
    """

    new: Fills = field(default_factory=Fills)
    old: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    inplace: Fills = field(default_factory=Fills)
    mapped: int = 0


def fill(
    work: Work,
    options: Options,
    *,
    verify: bool | None,
    undo: Undo | None,
    done: Callable[[int], None],
    limits: Limits = DEFAULT,
) -> None:
    """Fill the model as planned.

    Args:
        verify: Check CRCs while the bytes are warm; None checks those of what goes into new memory.
        undo: Keeps the way back for an existing model; None for a model that is thrown away on failure.
        done: Takes the bytes that were filled since the last call; `plan.nbytes` in all.

    Raises:
        FormatError: The file is damaged or ends early. An existing model is restored, or `.changed`
            names what is not.
    """
    if options.strict:
        check_extras(work)
    places = _allocate(work, options)
    new = verify is not False
    old = undo is None if verify is None else verify
    made: Made = {key: (own, _like(own, fresh)) for key, (own, fresh) in places.old.items() if own.is_meta}
    with naming(work.plan.path):
        prepare(places.new, check=new).run(done, limits=limits)
        try:
            call_loaders(work, undo, options, made, check=new)
            done(sum(info.nbytes for loader in work.called for info in loader.given.values()))
            inplace = places.inplace.seen_anew() if work.called else places.inplace
            _read_in_place(inplace, done, old, undo, limits)
            _put(work.model, options, places, made, undo)
            done(places.mapped)
            _set_counters(work, options, undo)
            set_extras(work, undo, options.strict)
            run_post_hooks(work.hooked)
        except BaseException as error:
            if undo is not None:
                undo.restore(error)
            raise


def _allocate(work: Work, options: Options) -> _Places:
    as_it_is = options.device is None and options.dtype is None
    mappings = Mappings() if options.mmap else None
    if as_it_is and mappings is None and all(work.fills.plain):
        return _Places(inplace=work.fills)
    new: list[Fill] = []
    nbytes = 0
    old: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    inplace: list[Fill] = []
    for given in work.fills:
        own, info, name, plain, _ = given
        if as_it_is and plain and mappings is None:
            inplace.append(given)
            continue
        if mappings is not None and (mapped := _mapped(mappings, own, info, options)) is not None:
            old[id(own)] = (own, mapped)
            nbytes += info.nbytes
            continue
        if as_it_is and is_plain(own) and not own.is_meta:
            inplace.append(Fill(own, info, name))
            continue
        device = options.device or (torch.device("cpu") if own.is_meta else own.device)
        dtype = final_dtype(own.dtype, info, options.dtype)
        if own.dtype == dtype and own.device == device and not own.is_meta and _writable(own):
            inplace.append(Fill(own, info, name))
            continue
        fresh = torch.empty_like(own.detach(), dtype=dtype, device=device, memory_format=_format(own))
        new.append(Fill(fresh, info, name))
        old[id(own)] = (own, fresh)
    return _Places(Fills.of(new), old, Fills.of(inplace), nbytes)


def _mapped(mappings: Mappings, own: torch.Tensor, info: TensorInfo, options: Options) -> torch.Tensor | None:
    """The stored tensor over its file's own pages, where the model can hold it as it lies there."""
    device = options.device or (torch.device("cpu") if own.is_meta else own.device)
    if device.type != "cpu" or type(own) not in PLAIN:
        return None
    return mappings.tensor(info, tuple(own.shape), final_dtype(own.dtype, info, options.dtype))


def _format(own: torch.Tensor) -> torch.memory_format:
    return torch.preserve_format if _writable(own) else torch.contiguous_format


def _writable(tensor: torch.Tensor) -> bool:
    """Every element has a place of its own, so that writing one does not write another."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return is_dense(shape, stride) or _apart(shape, stride)


def _apart(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    reach = 0
    for step, size in sorted(pair for pair in zip(stride, shape, strict=True) if pair[1] > 1):
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True


def _read_in_place(inplace: Fills, done: Callable[[int], None], check: bool, undo: Undo | None, limits: Limits) -> None:
    filling = prepare(inplace, check=check)
    if undo is not None:
        straight = sum(int(reads.nbytes.sum()) for _, reads in filling.reads)
        if straight + sum(tensor.nbytes for tensor in filling.staged.tensors) <= limits.undo_nbytes:
            undo.keep_filled(filling)
        else:
            undo.lose(inplace.names)
    filling.run(done, limits=limits)


def _like(own: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """What takes a meta tensor's place: `.data =` refuses to give that memory."""
    return nn.Parameter(fresh, own.requires_grad) if isinstance(own, nn.Parameter) else fresh


def _put(model: nn.Module, options: Options, places: _Places, made: Made, undo: Undo | None) -> None:
    """Put new memory in the place of the old, ties kept; move what the file does not fill."""
    if not places.old and options.device is None and options.dtype is None:
        return
    moved: dict[int, torch.Tensor] = {}
    for _, _, module in walk(model):
        if undo is not None:
            undo.keep_slots(module)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = _put_parameter(parameter, options, places, made)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                _, fresh = places.old.get(id(buffer), (buffer, None))
                module._buffers[name] = fresh if fresh is not None else _moved(buffer, options, moved)


def _put_parameter(parameter: nn.Parameter, options: Options, places: _Places, made: Made) -> nn.Parameter:
    """The parameter with its new memory, or the one that takes a meta parameter's place."""
    _, fresh = places.old.get(id(parameter), (parameter, None))
    _, new = made.get(id(parameter), (parameter, None))
    if new is not None:
        assert isinstance(new, nn.Parameter)
        return new
    data = fresh if fresh is not None else _moved(parameter, options, {})
    if data is not parameter:
        move(parameter, data)
    return parameter


def _moved(tensor: torch.Tensor, options: Options, moved: dict[int, torch.Tensor]) -> torch.Tensor:
    """The tensor on the device and in the dtype that were asked for; itself where nothing changes."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return tensor
    dtype = options.dtype if isinstance(options.dtype, torch.dtype) and tensor.is_floating_point() else tensor.dtype
    device = options.device or tensor.device
    if tensor.dtype == dtype and tensor.device == device:
        return tensor
    if id(tensor) not in moved:
        moved[id(tensor)] = tensor.detach().to(device=device, dtype=dtype)
    return moved[id(tensor)]


def _set_counters(work: Work, options: Options, undo: Undo | None) -> None:
    """Batch norms' counters that have no memory yet start at 0; wrappers get their own state."""
    with torch.no_grad():
        for target in work.counters:
            if target.now.is_meta:
                target.module._buffers[target.attribute] = torch.tensor(
                    0, dtype=target.tensor.dtype, device=options.device or "cpu"
                )
        for wrapped, value in work.wrapper_state:
            if undo is not None:
                undo.keep_bytes([wrapped.now])
            wrapped.now.fill_(value)
