"""Every error of anycard.

    RuntimeError
      CheckpointError            the base: catches all of the below
        FormatError              corrupt, truncated, not a checkpoint   (also a ValueError)
        UntrustedError           a class would have to be allowed       (also a pickle.UnpicklingError)
        MismatchError            the file does not fit the model        (carries .plan)
        DeviceError              a device was asked for that is not there
        ChoiceError              `key=`, `member=` or the call must be another one (also a ValueError)

A file that is not there stays FileNotFoundError; wrong Python arguments stay TypeError and ValueError.
"""

from __future__ import annotations

import pickle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.plans.load_plan import LoadPlan


class CheckpointError(RuntimeError):
    """What anycard raises.

    Attributes:
        path: The file, as given, or None.
        name: The tensor or record in question, or None.
        offset: Byte offset in the file, or None.
        changed: Canonical names of tensors that a late fault left changed; empty otherwise.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        name: str | None = None,
        offset: int | None = None,
        changed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.path = path
        self.name = name
        self.offset = offset
        self.changed = changed

    def __str__(self) -> str:
        message = str(self.args[0])
        if self.path is not None and self.path not in message:
            message = f"{self.path}: {message}"
        if self.offset is not None and f"byte {self.offset:,}" not in message:
            message += f" (at byte {self.offset:,})"
        return message


class FormatError(CheckpointError, ValueError):
    """The file is corrupt, cut short, or no checkpoint at all.

    Attributes:
        cut_short: A pickle goes on behind the bytes that were given: more of them, where there are more, may help.
    """

    cut_short: bool = False


class UntrustedError(CheckpointError, pickle.UnpicklingError):
    """Rebuilding the object needs classes that the caller did not allow.

    Attributes:
        needed: What `allow=` would have to name, ready to pass.
    """

    def __init__(self, message: str, *, needed: tuple[str, ...] = (), path: str | None = None) -> None:
        super().__init__(message, path=path)
        self.needed = needed


class MismatchError(CheckpointError):
    """The file does not fit the model; `.plan` is the plan that shows why."""

    def __init__(self, message: str, *, plan: LoadPlan | None = None, path: str | None = None) -> None:
        super().__init__(message, path=path)
        self.plan = plan


class DeviceError(CheckpointError):
    """A device was asked for that this machine does not have."""


class ChoiceError(CheckpointError, ValueError):
    """Several things, or none, could be meant; the message lists the choices."""


class naming:  # noqa: N801 - a context manager, as in contextlib, without importing that
    """Give errors from below the file's name."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, CheckpointError):
            error.path = error.path or self._path


for _error in (CheckpointError, FormatError, UntrustedError, MismatchError, DeviceError, ChoiceError):
    _error.__module__ = "anycard"
