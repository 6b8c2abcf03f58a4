"""PyTorch, which most verbs can do without: whether it is there, and what to say where it is not."""

from __future__ import annotations


def torch_is_there() -> bool:
    """It is installed; it is not imported."""
    from importlib.util import find_spec

    try:
        return find_spec("torch") is not None
    except ImportError:
        return False


def explained(error: ModuleNotFoundError, what: str) -> ModuleNotFoundError:
    """The error itself, or where it is PyTorch that is missing one that says what needs it, and what to do."""
    return needs_torch(what) if error.name == "torch" else error


def needs_torch(what: str) -> ModuleNotFoundError:
    """What is raised for a verb that needs PyTorch."""
    return ModuleNotFoundError(f"{what} needs PyTorch, which is not installed here: pip install torch", name="torch")
