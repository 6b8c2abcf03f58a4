"""Streams of cards: what a helper thread asks of a card is in order with what its caller has asked of it before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which this thread works on a card; None for other devices."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within this block this thread works on that stream's card by that stream."""
    if stream is None:
        yield
        return
    # The device, too: a new thread stands on card 0, and the stream's own block would take memory there to return.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
