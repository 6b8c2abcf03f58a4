"""Save a PyTorch model from any cards, load it on any others.

Names load on first use, so that `import anycard` stays light and needs no torch.
"""

from __future__ import annotations

from anycard.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.checkpoint import Checkpoint
    from anycard.checkpoint import open_checkpoint as open
    from anycard.errors import (
        CheckpointError,
        ChoiceError,
        DeviceError,
        FormatError,
        MismatchError,
        UntrustedError,
    )
    from anycard.operations.comparison import diff
    from anycard.operations.conversion import convert
    from anycard.operations.scanning import scan
    from anycard.operations.verification import verify
    from anycard.plans.load_plan import LoadPlan
    from anycard.tensors import TensorInfo
    from anycard.torch.loading import load, plan
    from anycard.torch.reading import read
    from anycard.torch.saving import save

    __all__ = [
        "Checkpoint",
        "CheckpointError",
        "ChoiceError",
        "DeviceError",
        "FormatError",
        "LoadPlan",
        "MismatchError",
        "TensorInfo",
        "UntrustedError",
        "__version__",
        "convert",
        "diff",
        "load",
        "open",
        "plan",
        "read",
        "save",
        "scan",
        "verify",
    ]

_HOMES = {
    "Checkpoint": ("anycard.checkpoint", "Checkpoint"),
    "CheckpointError": ("anycard.errors", "CheckpointError"),
    "ChoiceError": ("anycard.errors", "ChoiceError"),
    "DeviceError": ("anycard.errors", "DeviceError"),
    "FormatError": ("anycard.errors", "FormatError"),
    "LoadPlan": ("anycard.plans.load_plan", "LoadPlan"),
    "MismatchError": ("anycard.errors", "MismatchError"),
    "TensorInfo": ("anycard.tensors", "TensorInfo"),
    "UntrustedError": ("anycard.errors", "UntrustedError"),
    "convert": ("anycard.operations.conversion", "convert"),
    "diff": ("anycard.operations.comparison", "diff"),
    "load": ("anycard.torch.loading", "load"),
    "open": ("anycard.checkpoint", "open_checkpoint"),
    "plan": ("anycard.torch.loading", "plan"),
    "read": ("anycard.torch.reading", "read"),
    "save": ("anycard.torch.saving", "save"),
    "scan": ("anycard.operations.scanning", "scan"),
    "verify": ("anycard.operations.verification", "verify"),
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "__all__":
            globals()[name] = _public()
            return globals()[name]
        try:
            module, attribute = _HOMES[name]
        except KeyError:
            raise AttributeError(f"module 'anycard' has no attribute {name!r}") from None
        import importlib

        try:
            value = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            from anycard.needs_torch import explained

            raise explained(error, f"anycard.{name}") from None
        globals()[name] = value
        return value

    def __dir__():
        return __getattr__("__all__")

    def _public():
        """The names that are there: without PyTorch, those that can do without it."""
        from anycard.needs_torch import torch_is_there

        there = torch_is_there()
        return sorted(["__version__", *(name for name in _HOMES if there or "torch" not in _HOMES[name][0])])
