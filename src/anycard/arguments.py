"""What callers give, looked at before anything is done, so that a wrong argument changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def refuse_odd(*, key: object = None, member: object = None, progress: object = None) -> None:
    """TypeError for what several verbs take, where it is nothing that they know."""
    meant = {"key": (key, "which state dict in the file"), "member": (member, "which file in the file")}
    for name, (value, what) in meant.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} is a text that says {what}, or None, not {shown(value)}")
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress is True for a bar, a function of (done, total) bytes, or None, not {shown(progress)}"
        )


def allowed(allow: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names that `allow=` gives: of one text or several, none of None."""
    given: object = allow
    if allow is None or isinstance(allow, str):
        return () if allow is None else (allow,)
    if not isinstance(given, Iterable):
        raise TypeError(f"allow is a name such as 'package.module.Class', or a list of them, not {shown(allow)}")
    names = tuple(given)
    for odd in (name for name in names if not isinstance(name, str)):
        meant = f"{odd.__module__}.{odd.__qualname__}" if isinstance(odd, type) else "package.module.Class"
        raise TypeError(f"allow takes names such as {meant!r}, not {shown(odd)}")
    return names


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as text."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a path is needed, not {shown(path)}")
    text: object = os.fspath(path)
    if isinstance(text, str):
        return text
    raise TypeError(f"a path is needed whose text is a str: {type(path).__name__} gives {shown(text)}")


def shown(value: object) -> str:
    """A short value as it is, anything else by its type: a model's text has many lines."""
    return f"{value!r:.80}" if isinstance(value, _PLAIN) else f"a {type(value).__name__}"
