"""Bounds and tunables, in one frozen object that is passed down. Tests shrink them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on what a file may claim, and sizes of the work.

    Attributes:
        chunk_nbytes: The most that one read, write or conversion moves at once.
        threads: Readers at once.
        undo_nbytes: How many bytes of an existing model are kept to restore it after a late fault.
        index_nbytes: Largest pickle or JSON header that is parsed.
        records: Most records in an archive, or tensors in a header.
        nodes: Most containers and leaves visited when a file's objects are listed.
        repeats: Most parts that are listed again because what holds them is shared.
        globals: Most distinct classes that a pickle may name.
        depth: Deepest nesting of containers that is listed.
        rank: Most dimensions of a tensor.
        expanded_nbytes: How much more than what is stored tensors may come to (stride 0).
    """

    chunk_nbytes: int = 8 << 20
    threads: int = 2
    undo_nbytes: int = 64 << 20
    index_nbytes: int = 1 << 30
    records: int = 4_000_000
    nodes: int = 20_000_000
    repeats: int = 100_000
    globals: int = 20_000
    depth: int = 400
    rank: int = 64
    expanded_nbytes: int = 64 << 20


DEFAULT = Limits()
