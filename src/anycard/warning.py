"""Warnings that point at the caller's line, not into anycard."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning at the first frame outside the package."""
    level, frame = 2, sys._getframe(1)  # level 2 is who called this
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("anycard."):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
