"""Rebuild a whole model from inert data: objects are made by `__new__` and state; `__init__` never runs.

Nothing is called but what `allow=` names in full.
"""

from __future__ import annotations

import inspect
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from anycard.checkpoint import Checkpoint
from anycard.errors import CheckpointError, ChoiceError, FormatError, UntrustedError
from anycard.names.choosing import pick
from anycard.names.pickled_modules import inert_wrapper, module_state, wrapped_module
from anycard.pickles.arrays import ArrayStub
from anycard.pickles.stubs import Counted, Defaulting, Inert, Size
from anycard.pickles.views import StoredStorage
from anycard.progress import Progress, counting
from anycard.tensors import TensorInfo, form_of
from anycard.torch.completing import Lack, complete, prepare
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.reading import read_tensor
from anycard.torch.trusting import NotAllowedError, NotThereError, Trust, is_getattr, named_by
from anycard.warning import warn

_NO_GETATTR = "attributes are looked up in classes and objects of the file only; getattr is never called"
_BACKEND = ("torch.nn.backends.thnn", "_get_thnn_function_backend")  # below 1.4 every module kept it


def rebuild_model(
    ckpt: Checkpoint, allow: tuple[str, ...], key: str | None = None, progress: Progress = None
) -> nn.Module:
    """The whole model in a checkpoint, out of its wrappers.

    Raises:
        UntrustedError: Classes are needed that `allow` does not name; lists them all.
        ChoiceError: The file holds several whole models, or none.
    """
    if ckpt.format in ("TorchScript", "torch export"):
        reason = f"{ckpt.path} is a {ckpt.format} archive, whose code is not run: give a model to load into, or read it"
        raise ChoiceError(f"{reason} by anycard.read", path=ckpt.path)
    found = pick([c for c in ckpt.state_dicts if c.canonical is not None], key, ckpt.path)
    root = found.held
    if root is None:
        raise ChoiceError(f"{ckpt.path}: {key!r} is a part of a whole model, but no module", path=ckpt.path)
    builder = _Builder(allow, ckpt.path)
    builder.look(root)
    builder.refuse()
    with counting(progress, builder.nbytes) as builder.done:
        try:
            model = builder.make(root)
        except RecursionError:
            reason = "objects that hold each other deeper than Python can follow: load it into a model that you build"
            raise CheckpointError(f"{ckpt.path} has {reason}", path=ckpt.path) from None
    if not isinstance(model, nn.Module):
        raise ChoiceError(f"{ckpt.path}: {type(model).__name__} is no nn.Module", path=ckpt.path)
    _tell(builder.lacks, ckpt.path)
    return model


def _tell(lacks: Iterable[Lack], path: str) -> None:
    """An error for what a class of today asks its caller for, a warning for what it would compute."""
    required = dict.fromkeys(lack.path for lack in lacks if lack.required)
    if required:
        raise CheckpointError(
            f"{path} is older than its classes: it lacks {', '.join(required)}, which have no default. "
            "Build the model yourself and load the weights into it: anycard.load(path, model)",
            path=path,
            name=next(iter(required)),
        )
    computed = dict.fromkeys(lack.path for lack in lacks)
    if computed:
        warn(f"{path}: the rebuilt model lacks {', '.join(computed)}, which its classes set today; where it needs "
             "them, build the model yourself and load the weights into it")  # fmt: skip


def _inner(obj: Any) -> Any:
    """The module behind wrappers."""
    while isinstance(obj, Inert) and not is_getattr(obj) and (row := inert_wrapper(obj)) is not None:
        state = module_state(obj)
        inside = wrapped_module(obj) if state is None else state["_modules"].get(row.child)
        if inside is None:
            break
        obj = inside
    return obj


class _Builder:
    def __init__(self, allow: tuple[str, ...], path: str) -> None:
        self.trust = Trust(allow)
        self.path = path
        self.missing: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.made: dict[int, Any] = {}
        self.keep: list[Any] = []
        self.uses: dict[int, set[int]] = {}
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.lacks: list[Lack] = []
        self.nbytes = 0
        self.done: Callable[[int], None] = lambda nbytes: None

    def refuse(self) -> None:
        """UntrustedError where anything has to be allowed, CheckpointError where that alone does not help."""
        faults = "".join(f"\n  {name}: {reason}" for name, reason in self.faults.items())
        weights = "The weights alone need none of it: anycard.load(path, model) or anycard.read(path)."
        if self.missing:
            names = [*self.trust.allow, *(name for name in self.missing if name not in self.trust.allow)]
            also = f" What cannot be had even then:{faults}" if faults else ""
            raise UntrustedError(
                f"rebuilding the model needs {', '.join(self.missing.values())}. If you trust them: allow={names!r}. "
                f"{weights}{also}",
                needed=tuple(names),
                path=self.path,
            )
        if faults:
            raise CheckpointError(
                f"{self.path}: the model cannot be rebuilt here: what it needs is allowed, but not to be had. Is it "
                f"installed, and its folder on sys.path? {weights}{faults}",
                path=self.path,
                name=next(iter(self.faults)),
            )

    def look(self, root: Any) -> None:
        """Note every class that is needed and not allowed; imports only what is allowed."""
        stack, seen = [root], set()
        while stack:
            obj = _inner(stack.pop())
            if id(obj) in seen:
                continue
            seen.add(id(obj))
            if (named := named_by(obj)) is not None:
                self._need(named, call=False)
            elif isinstance(obj, StoredStorage) and obj.storage is not None:
                self.uses.setdefault(id(obj.storage), set()).update((id(obj), 0))  # never read for itself alone
                self.nbytes += obj.storage.nbytes
            elif isinstance(obj, Inert):
                stack += self._parts(obj)
            elif isinstance(obj, TensorInfo):
                self.uses.setdefault(id(obj.storage), set()).add(id(obj))
                self.nbytes += obj.nbytes
            elif isinstance(obj, Mapping):
                stack += [*obj.keys(), *obj.values(), *_beside(obj)]
            elif isinstance(obj, (list, tuple, set, frozenset)):
                stack += obj

    def _parts(self, obj: Inert) -> list[Any]:
        """Note the class of an object; gives what the object holds."""
        if is_getattr(obj):
            if not isinstance(obj.args[0], Inert):
                self.faults[f"a {type(obj.args[0]).__name__}'s {obj.args[1]}"] = _NO_GETATTR
            return [obj.args[0]]
        named = named_by(obj.callee)
        if named is None:
            self.faults[f"what {obj.callee.path} gives"] = "it is called, but only what has a name can be allowed"
        elif named != _BACKEND:
            self._need(named, call=obj.called)
        return [*obj.args, *obj.kwargs.values(), obj.state, *obj.items, *(part for pair in obj.pairs for part in pair)]

    def _need(self, named: tuple[str, str], *, call: bool) -> None:
        try:
            self.trust.find(*named, call=call)
        except NotAllowedError as error:
            name, given = error.name, ".".join(named)
            self.missing[name] = name if name == given else f"{name} (which {given} is today)"
        except NotThereError as error:
            self.faults[".".join(named)] = str(error)

    def make(self, obj: Any) -> Any:
        """The real object for inert data; shared objects stay shared."""
        obj = _inner(obj)
        if id(obj) in self.made:
            return self.made[id(obj)]
        if isinstance(obj, (str, int, float, bool, bytes, complex, type(None))):
            return obj
        self.keep.append(obj)
        return self._make(obj)

    def _make(self, obj: Any) -> Any:
        if isinstance(obj, TensorInfo):
            made = self._done(obj, self._tensor(obj))
            self.done(obj.nbytes)
            return made
        if (named := named_by(obj)) is not None:
            return self._done(obj, self.trust.find(*named, call=False))
        if isinstance(obj, StoredStorage) and obj.storage is not None:
            made = self._done(obj, self._storage(obj))
            self.done(obj.storage.nbytes)
            return made
        if isinstance(obj, Inert):
            return self._object(obj)
        if isinstance(obj, Size):
            return self._done(obj, torch.Size(obj))
        if isinstance(obj, (tuple, set, frozenset)):
            held = type(obj)(self.make(v) for v in obj)
            return self.made.get(id(obj)) or self._done(obj, held)  # one of its own elements may have made it
        if isinstance(obj, list):
            items = self._done(obj, [])
            items.extend(self.make(v) for v in obj)
            return items
        if isinstance(obj, Mapping):
            return self._mapping(obj)
        return obj

    def _mapping(self, obj: Mapping[Any, Any]) -> dict[Any, Any]:
        """A mapping of the kind that was pickled."""
        held: dict[Any, Any] = {}
        if isinstance(obj, Defaulting):
            held = defaultdict(self.make(obj.factory))
        elif isinstance(obj, (Counted, OrderedDict)):
            held = Counter() if isinstance(obj, Counted) else OrderedDict()
        self._done(obj, held)
        for key, value in obj.items():
            held[self.make(key)] = self.make(value)
        if type(obj) is OrderedDict and vars(obj):
            vars(held).update(self.make(vars(obj)))
        return held

    def _done(self, obj: Any, made: Any) -> Any:
        self.made[id(obj)] = made
        return made

    def _tensor(self, info: TensorInfo) -> Any:
        if info.is_array and not info.parameter:
            return read_tensor(info).numpy()
        tensor = self._view(info)
        if info.parameter:
            return nn.Parameter(tensor, requires_grad=info.requires_grad)
        return tensor.requires_grad_() if info.requires_grad else tensor

    def _view(self, info: TensorInfo) -> torch.Tensor:
        """The tensor, in one memory with the others that are views of the same storage."""
        if len(self.uses.get(id(info.storage), ())) < 2 or info.conj or info.neg or info.storage.big_endian:
            return read_tensor(info)
        if id(info.storage) not in self.memory:
            whole = TensorInfo(form_of("uint8", (info.storage.nbytes,)), info.storage)
            self.memory[id(info.storage)] = read_tensor(whole).untyped_storage()
        tensor = torch.empty(0, dtype=TO_TORCH[info.dtype], device="cpu")
        offset = info.start // tensor.element_size()
        return tensor.set_(self.memory[id(info.storage)], offset, info.shape, info.stride)

    def _storage(self, stub: StoredStorage) -> Any:
        """A storage by itself, in one memory with the tensors that are views of it."""
        whole, dtype = self._view(stub.args[0]), type(stub).dtype
        memory = whole.clone().untyped_storage() if stub.start else whole.untyped_storage()
        if dtype is None:
            return memory
        return torch.storage.TypedStorage(wrap_storage=memory, dtype=getattr(torch, dtype), _internal=True)  # type: ignore[no-untyped-call]

    def _object(self, obj: Inert) -> Any:
        """In the order of pickle's own: made, then its items, then its state."""
        if is_getattr(obj):
            return self._done(obj, self._method(*obj.args))
        module, name = named_by(obj.callee) or ("", "")
        if (module, name) == _BACKEND:
            return None
        real = self.trust.find(module, name, call=obj.called)
        args = [self.make(a) for a in obj.args]
        make = real.__new__ if isinstance(obj, ArrayStub) or not obj.called else real
        if not obj.called:  # an array's arguments begin with its class
            args.insert(0, real)
        kwargs = {key: self.make(value) for key, value in obj.kwargs.items()}
        running = _Running(f"{module}.{name}", self.path)
        with running:
            made = make(*args, **kwargs)
        self._done(obj, made)
        items, pairs = [self.make(i) for i in obj.items], [(self.make(k), self.make(v)) for k, v in obj.pairs]
        with running:
            if items:
                made.extend(items)
            for key, value in pairs:
                made[key] = value
        state = self.make(obj.state)
        with running:
            if obj.state is not None:
                self._restore(made, state)
            if isinstance(made, nn.Module):
                self.lacks += complete(made)
        return made

    def _method(self, owner: Inert, name: str) -> Any:
        """A method of a rebuilt object: a function of its class, bound; it runs no code of the class to find it."""
        made = self.make(owner)
        function = inspect.getattr_static(type(made), name, None)
        if not inspect.isfunction(function):
            what = f"the model keeps {name!r} of a {type(made).__name__}, which is no method that its class defines"
            raise FormatError(what, path=self.path, name=name)
        return MethodType(function, made)

    def _restore(self, made: Any, state: Any) -> None:
        """As pickle's BUILD: the object's own `__setstate__`, else its `__dict__`."""
        if hasattr(made, "__setstate__"):
            made.__setstate__(prepare(type(made), state))
            return
        slots: dict[str, Any] = {}
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        if state:
            made.__dict__.update(state)
        for name, value in (slots or {}).items():
            setattr(made, name, value)


class _Running:
    """What the code of an allowed class raises is a CheckpointError that names it."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (CheckpointError, MemoryError, RecursionError)):
            what = f"{self.path}: {self.name} cannot be rebuilt: {type(error).__name__}: {error}"
            raise CheckpointError(what, path=self.path, name=self.name) from error


def _beside(obj: Mapping[Any, Any]) -> list[Any]:
    """What is not in a mapping, but on it: a default factory, a state dict's `_metadata`."""
    if isinstance(obj, Defaulting):
        return [obj.factory]
    return [vars(obj)] if type(obj) is OrderedDict and vars(obj) else []
