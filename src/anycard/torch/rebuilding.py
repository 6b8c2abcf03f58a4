"""Rebuild a whole model from inert data, importing nothing but torch's own modules and what is allowed.

Objects are made by `__new__` and state; `__init__` never runs. Nothing is called but what `allow=` names
in full.
"""

from __future__ import annotations

import importlib
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
from anycard.names.pickled_modules import inert_wrapper, is_module, module_state, wrapped_module
from anycard.pickles.stubs import Counted, Defaulting, Inert, Size
from anycard.progress import Progress, counting
from anycard.tensors import TensorInfo, form_of
from anycard.torch.completing import Lack, complete, prepare
from anycard.torch.dtypes import TO_TORCH
from anycard.torch.reading import read_tensor
from anycard.warning import warn

_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bool)}
_BACKEND = ("torch.nn.backends.thnn", "_get_thnn_function_backend")  # below 1.4 every module kept it
_DATA = {("torch", "device"), ("torch", "Size"), _BACKEND}
# Classes of torch's own that have another name today.
_RENAMED = {
    ("torch.nn.modules.linear", "_LinearWithBias"): "NonDynamicallyQuantizableLinear",
}


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
    root = _at(ckpt.tree, found.key)
    builder = _Builder(allow, ckpt.path)
    builder.look(root)
    builder.refuse()
    with counting(progress, builder.nbytes) as builder.done:
        model = builder.make(root)
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


def _at(tree: Any, key: str) -> Any:
    while key:
        for name, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            if key == str(name) or key.startswith(f"{name}."):
                tree, key = value, key[len(str(name)) + 1 :]
                break
        else:
            raise FormatError(f"no object at {key!r}")
    return tree


def _inner(obj: Any) -> Any:
    """The module behind wrappers."""
    while isinstance(obj, Inert) and not _is_method(obj):
        inside = wrapped_module(obj)
        row, state = inert_wrapper(obj), module_state(obj)
        if inside is not None:
            obj = inside
        elif row is not None and state is not None and row.child in state["_modules"]:
            obj = state["_modules"][row.child]
        else:
            break
    return obj


def _is_method(obj: Any) -> bool:
    """A method that a model keeps: (getattr, (module, name)), which is never called."""
    called = isinstance(obj, Inert) and (type(obj).module, type(obj).name) == ("builtins", "getattr")
    return called and len(obj.args) == 2 and is_module(obj.args[0]) and isinstance(obj.args[1], str)


class _Builder:
    def __init__(self, allow: tuple[str, ...], path: str) -> None:
        self.allow = allow
        self.path = path
        self.missing: dict[str, None] = {}
        self.made: dict[int, Any] = {}
        self.keep: list[Any] = []
        self.uses: dict[int, set[object]] = {}
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.lacks: list[Lack] = []
        self.nbytes = 0
        self.done: Callable[[int], None] = lambda nbytes: None

    def refuse(self) -> None:
        """UntrustedError where anything is needed that was not allowed."""
        if self.missing:
            names = list(self.missing)
            raise UntrustedError(
                f"rebuilding the model needs {', '.join(names)}. If you trust them: allow={names!r}. "
                "The weights alone need nobody's trust: anycard.load(path, model) or anycard.read(path).",
                needed=tuple(names),
                path=self.path,
            )

    def look(self, root: Any) -> None:
        """Note every class that is needed and not allowed; imports only what is allowed."""
        stack, seen = [root], set()
        while stack:
            obj = _inner(stack.pop())
            if id(obj) in seen:
                continue
            seen.add(id(obj))
            if isinstance(obj, type) and issubclass(obj, Inert):
                self._need(obj, call=False)
            elif isinstance(obj, Inert) and _is_method(obj):
                stack.append(obj.args[0])
            elif isinstance(obj, Inert):
                if isinstance(obj.callee, type):
                    self._need(type(obj), call=obj.called)
                else:
                    self.missing["a call of " + obj.callee.path] = None
                stack += [*obj.args, *obj.kwargs.values(), obj.state, *obj.items]
                stack += [part for pair in obj.pairs for part in pair]
            elif isinstance(obj, TensorInfo):
                self.uses.setdefault(id(obj.storage), set()).add(obj.place)
                self.nbytes += obj.nbytes
            elif isinstance(obj, Defaulting):
                known = isinstance(obj.factory, type) and obj.factory.__name__ in _FACTORIES
                stack += [*obj.keys(), *obj.values(), *([] if known else [obj.factory])]
            elif isinstance(obj, Mapping):
                stack += [*obj.keys(), *obj.values()]
            elif isinstance(obj, (list, tuple, set, frozenset)):
                stack += obj

    def _need(self, kind: type[Inert], *, call: bool) -> None:
        if (kind.module, kind.name) in _DATA or _is_dtype(kind):
            return
        if not self._allowed(kind.module, kind.name, call) or self._resolve(kind, call) is None:
            self.missing[f"{kind.module}.{kind.name}"] = None

    def _allowed(self, module: str, name: str, call: bool) -> bool:
        full = f"{module}.{name}"
        if full in self.allow:
            return True
        if call:
            return False
        within = any(a == module or (a.endswith(".*") and f"{module}.".startswith(a[:-1])) for a in self.allow)
        return within or module == "torch.nn" or module.startswith("torch.nn.")

    def _resolve(self, kind: type[Inert], call: bool) -> Any:
        """The real class or function: defined in the module that is named, and no dotted attribute."""
        if "." in kind.name:
            return None
        name = _RENAMED.get((kind.module, kind.name), kind.name)
        try:
            value = getattr(importlib.import_module(kind.module), name)
        except (ImportError, AttributeError):
            return None
        if getattr(value, "__module__", None) != kind.module:
            return None
        trusted = any(f"{kind.module}.{kind.name}" == a for a in self.allow)
        if inspect.isclass(value):
            by_torch = kind.module.startswith("torch.nn") and not trusted
            return value if not by_torch or issubclass(value, nn.Module) else None
        return value if (inspect.isfunction(value) and not call) or trusted else None

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
        if isinstance(obj, type) and issubclass(obj, Inert):
            return TO_TORCH[obj.name] if _is_dtype(obj) else self._resolve(obj, call=False)
        if isinstance(obj, Inert):
            return self._object(obj)
        if isinstance(obj, Size):
            return self._done(obj, torch.Size(obj))
        if isinstance(obj, (tuple, set, frozenset)):
            return self._done(obj, type(obj)(self.make(v) for v in obj))
        if isinstance(obj, list):
            items = self._done(obj, [])
            items.extend(self.make(v) for v in obj)
            return items
        if isinstance(obj, Mapping):
            held = self._done(obj, self._mapping(obj))
            for key, value in obj.items():
                held[self.make(key)] = self.make(value)
            return held
        return obj

    def _mapping(self, obj: Mapping[Any, Any]) -> dict[Any, Any]:
        """An empty mapping of the kind that was pickled."""
        if isinstance(obj, Defaulting):
            return defaultdict(self._factory(obj.factory))
        if isinstance(obj, Counted):
            return Counter()
        return OrderedDict() if isinstance(obj, OrderedDict) else {}

    def _factory(self, stub: Any) -> Any:
        """A default factory: one of Python's own containers and numbers, or what was allowed."""
        if isinstance(stub, type) and issubclass(stub, Inert) and stub.module == "builtins":
            return _FACTORIES.get(stub.name)
        return None if stub is None else self.make(stub)

    def _done(self, obj: Any, made: Any) -> Any:
        self.made[id(obj)] = made
        return made

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
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

    def _object(self, obj: Inert) -> Any:
        kind = type(obj)
        if (kind.module, kind.name) == ("torch", "device"):
            return self._done(obj, torch.device(*obj.args))
        if (kind.module, kind.name) == _BACKEND:
            return None
        if _is_method(obj):
            return self._done(obj, self._method(*obj.args))
        real = self._resolve(kind, obj.called)
        args = [self.make(a) for a in obj.args]
        made = real(*args) if obj.called else real.__new__(real, *args)
        self._done(obj, made)
        if obj.state is not None:
            self._restore(made, self.make(obj.state))
        if obj.items:
            made.extend(self.make(i) for i in obj.items)
        for key, value in obj.pairs:
            made[self.make(key)] = self.make(value)
        if isinstance(made, nn.Module):
            self.lacks += complete(made)
        return made

    def _method(self, owner: Inert, name: str) -> Any:
        """A method of a rebuilt module: a function of its class, bound; it runs no code of the class to find it."""
        made = self.make(owner)
        function = inspect.getattr_static(type(made), name, None)
        if not inspect.isfunction(function):
            raise FormatError(f"the model keeps {name!r} of a {type(made).__name__}, which is no method of it")
        return MethodType(function, made)

    def _restore(self, made: Any, state: Any) -> None:
        """As pickle's BUILD: the object's own `__setstate__`, else its `__dict__`."""
        if hasattr(made, "__setstate__"):
            made.__setstate__(prepare(type(made), state))
            return
        slots: dict[str, Any] = {}
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        made.__dict__.update(state or {})
        for name, value in (slots or {}).items():
            setattr(made, name, value)


def _is_dtype(kind: type[Inert]) -> bool:
    return kind.module == "torch" and kind.name in TO_TORCH
