"""What a whole model may be made of: torch's own classes and functions, and what `allow=` names.

A name leads to what is defined in the module that it names. From there no attribute is looked up but what stands
in a class: its nested classes and its functions.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import sys
from types import MethodType
from typing import Any

import torch
from torch import nn

from anycard.pickles.stubs import Inert

# Classes of torch's own that have another name today.
_RENAMED = {
    ("torch.nn.modules.linear", "_LinearWithBias"): "NonDynamicallyQuantizableLinear",
}
# What torch keeps on modules that is no module: made by `__new__` and state, as modules are.
_KEPT_BY_MODULES = {
    "torch.nn.modules.module": {"_WrappedHook"},
    "torch.nn.utils.weight_norm": {"WeightNorm"},
    "torch.nn.utils.spectral_norm": {
        "SpectralNorm", "SpectralNormLoadStateDictPreHook", "SpectralNormStateDictHook",
    },
    "torch.nn.utils.prune": {
        "PruningContainer", "Identity", "RandomUnstructured", "L1Unstructured", "RandomStructured", "LnStructured",
        "CustomFromMask",
    },
}  # fmt: skip
_CALLED = {("torch", "device"): torch.device, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}
_BUILTINS = ("list", "dict", "set", "frozenset", "tuple", "int", "float", "complex", "str", "bytes", "bytearray",
             "bool", "object", "Ellipsis", "NotImplemented")  # fmt: skip
_VALUES = (torch.dtype, torch.layout, torch.qscheme, torch.memory_format)
# How torch.nn.functional.gelu and torch.relu are pickled: module, class, what has them.
_OPERATIONS = {
    ("torch._C._nn", ""): torch._C._nn,
    ("torch._C", "_VariableFunctionsClass"): torch._C._VariableFunctions,
}


class NotAllowedError(Exception):
    """`allow=` would have to name `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class NotThereError(Exception):
    """Says why what is allowed cannot be had."""


def is_getattr(obj: Any) -> bool:
    """An attribute that the pickle asks for: (getattr, (owner, name)), which is never called."""
    called = isinstance(obj, Inert) and (type(obj).module, type(obj).name) == ("builtins", "getattr")
    return called and len(obj.args) == 2 and isinstance(obj.args[1], str)


def named_by(obj: Any) -> tuple[str, str] | None:
    """Module and name of a class or function that is referred to, also as a class's attribute; None for all else."""
    names: list[str] = []
    while is_getattr(obj):
        names.append(obj.args[1])
        obj = obj.args[0]
    if isinstance(obj, type) and issubclass(obj, Inert):
        return obj.module, ".".join((obj.name, *reversed(names)))
    return None


class Trust:
    """The caller's `allow=`, and what it leads to."""

    def __init__(self, allow: tuple[str, ...]) -> None:
        self.allow = allow

    def find(self, module: str, name: str, *, call: bool) -> Any:
        """The class or function of that name; imports only what is allowed.

        Args:
            call: It is to be called, which only a full name allows.

        Raises:
            NotAllowedError: It, or the class that it is today, has to be allowed.
            NotThereError: It is allowed, but cannot be had.
        """
        own = _own(module, name, call)
        if own is not None:
            return own
        if (module, name) == ("builtins", "getattr") and call:
            raise NotThereError("an attribute of it is asked for by getattr, which is never called")
        self._check(module, name, call)
        value, home, path = self._defined(module, name, call)
        full = f"{home}.{path}"
        if full in self.allow or _is_plain(value, home, path, call):
            return value
        raise NotAllowedError(full)

    def _check(self, module: str, name: str, call: bool) -> None:
        full = f"{module}.{name}"
        if full in self.allow:
            return
        within = any(a == module or (a.endswith(".*") and f"{module}.".startswith(a[:-1])) for a in self.allow)
        if call or not (within or _is_of_nn(module)):
            raise NotAllowedError(full)

    def _defined(self, module: str, name: str, call: bool) -> tuple[Any, str, str]:
        """The value, its module and its name there; of what only stands in `module`, its own have to be allowed too."""
        first, *rest = name.split(".")
        value = _global(module, _RENAMED.get((module, first), first))
        home, path = getattr(value, "__module__", None), first
        if home != module:
            path = getattr(value, "__qualname__", first)
            if not isinstance(home, str) or _attribute(sys.modules.get(home), path) is not value:
                raise NotThereError(f"{first} is not defined in {module}, which has it from elsewhere: {value!r:.80}")
            self._check(home, ".".join((path, *rest)), call)
        for part in rest:
            value = _within(value, part)
        return value, home, ".".join((path, *rest))


def _own(module: str, name: str, call: bool) -> Any:
    """What torch and Python have that does nothing; None for all else."""
    if call:
        return _CALLED.get((module, name))
    if module == "builtins" and name in _BUILTINS:
        return getattr(builtins, name)
    kind, _, operation = name.rpartition(".")
    if (module, kind) in _OPERATIONS:
        return _operation(_OPERATIONS[module, kind], operation)
    value = vars(torch).get(name) if module == "torch" else None
    return value if isinstance(value, _VALUES) or value is torch.Size or value is torch.device else None


def _operation(holder: Any, name: str) -> Any:
    """A function of torch's on tensors: one that tensors or `torch.nn.functional` have too."""
    value = getattr(holder, name, None)
    known = hasattr(torch.Tensor, name) or getattr(nn.functional, name, None) is value
    return value if known and inspect.isbuiltin(value) else None


def _is_of_nn(module: str) -> bool:
    return module == "torch.nn" or module.startswith("torch.nn.")


def _is_plain(value: Any, module: str, name: str, call: bool) -> bool:
    """A class or function that its module's being allowed allows; of torch's own, what it keeps on modules."""
    if inspect.isclass(value):
        of_nn = issubclass(value, nn.Module) or name in _KEPT_BY_MODULES.get(module, ())
        return of_nn if _is_of_nn(module) else not issubclass(value, type)  # a metaclass would make classes
    return not call and (inspect.isfunction(value) or inspect.ismethod(value))


def _global(module: str, name: str) -> Any:
    try:
        holder = importlib.import_module(module)
    except Exception as error:  # whatever its own code raises
        raise NotThereError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        value = getattr(holder, name)
    except AttributeError:
        raise NotThereError(f"{module} has no {name}") from None
    if inspect.ismodule(value):
        raise NotThereError(f"{module}.{name} is a module")
    return value


def _attribute(holder: Any, path: str) -> Any:
    for part in path.split("."):
        holder = getattr(holder, part, None)
    return holder


def _within(owner: Any, name: str) -> Any:
    """A class that is defined in a class, or one of its functions; none of its code runs to find it."""
    if not inspect.isclass(owner):
        raise NotThereError(f"{name} is asked of {owner!r:.80}, which is no class")
    value = inspect.getattr_static(owner, name, None)
    if inspect.isclass(value):
        nested = (value.__module__, value.__qualname__) == (owner.__module__, f"{owner.__qualname__}.{name}")
        value = value if nested else None
    elif isinstance(value, classmethod):
        value = MethodType(value.__func__, owner)
    elif isinstance(value, staticmethod):
        value = value.__func__
    if not inspect.isclass(value) and not inspect.isroutine(value):
        raise NotThereError(f"{owner.__qualname__} has no class and no function {name} of its own")
    return value
