"""stdout and stderr as the command line writes them."""

from __future__ import annotations

import io
import sys
from typing import Any


class _Quiet(io.FileIO):
    """A pipe whose reader may have seen enough (`| head -1`): the verb goes on, since its exit status is the answer.

    Any other error, such as a full disk, is raised once: what the buffers still hold comes again at the very end.
    """

    _gone = False

    def write(self, data: Any, /) -> int:
        if not self._gone:
            try:
                return super().write(data)
            except OSError as error:
                self._gone = True
                if not isinstance(error, BrokenPipeError):
                    raise
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """No text ends in UnicodeEncodeError, whatever the locale; a closed pipe ends quietly."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        if not stream.isatty():
            binary = io.BufferedWriter(_Quiet(stream.fileno(), "w", closefd=False))
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(binary, stream.encoding, "backslashreplace", line_buffering=lines))
