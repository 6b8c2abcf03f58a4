"""`verify`: every byte that carries a checksum, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from anycard.arguments import refuse_odd
from anycard.checkpoint import Checkpoint, open_checkpoint
from anycard.disk.threads import in_threads
from anycard.errors import FormatError
from anycard.formats.dcp_packed import PackedBytes
from anycard.formats.safetensors import FINGERPRINT
from anycard.limits import DEFAULT, Limits
from anycard.operations.fingerprinting import fingerprint_of
from anycard.operations.sums import crc_of, has_sum, stored
from anycard.progress import Progress, counting
from anycard.tensors import Storage


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        path, format: The file.
        damaged: Names of tensors or records whose checksum does not match.
        unchecked: Names that carry no checksum.
        checked: How many were checked and are whole.
    """

    path: str
    format: str
    damaged: tuple[str, ...]
    unchecked: tuple[str, ...]
    checked: int

    @property
    def ok(self) -> bool:
        """Nothing is damaged."""
        return not self.damaged


def verify(path: str | os.PathLike[str] | BinaryIO, *, member: str | None = None, progress: Progress = None) -> Report:
    """Check every checksum in a file.

    Args:
        member: Which file, where this one holds checkpoints inside.
        progress: True for a bar on stderr, or a function of (done, total) bytes.

    Raises:
        FormatError: The index cannot be read.
        ChoiceError: Several checkpoints are inside, and no `member` was given.
    """
    refuse_odd(member=member, progress=progress)
    with open_checkpoint(path, member=member) as ckpt:
        return verify_checkpoint(ckpt, progress=progress)


def verify_checkpoint(ckpt: Checkpoint, limits: Limits = DEFAULT, *, progress: Progress = None) -> Report:
    """The same, of an open checkpoint."""
    if ckpt.format == "safetensors":
        return _by_fingerprint(ckpt, limits, progress)
    names: dict[int, list[str]] = {}
    storages: dict[int, Storage] = {}
    for name, info in ckpt.tensors.items():
        for storage in stored(info.storage):
            storages[id(storage)] = storage
            names.setdefault(id(storage), []).append(name)
    damaged: list[str] = []
    unchecked: list[str] = []
    summed = [storage for storage in storages.values() if has_sum(storage)]
    crcs: dict[int, int] = {}
    with counting(progress, sum(storage.nbytes for storage in summed)) as done:
        in_threads(summed, lambda storage: crcs.update({id(storage): crc_of(storage, done)}), limits.threads)
    for place, storage in storages.items():
        if isinstance(storage.data, PackedBytes):
            damaged += [] if _inflates(storage.data) else names[place]
        elif place not in crcs:
            unchecked += names[place]
        elif crcs[place] != storage.crc:
            damaged += names[place]
    damaged += _other_records(ckpt, {id(s): s for s in storages.values()}, limits)
    damaged, unchecked = list(dict.fromkeys(damaged)), list(dict.fromkeys(unchecked))
    checked = len(ckpt.tensors.keys() - {*damaged, *unchecked})
    return Report(ckpt.path, ckpt.format, tuple(damaged), tuple(unchecked), checked)


def _other_records(ckpt: Checkpoint, storages: dict[int, Storage], limits: Limits) -> list[str]:
    from anycard.formats.torch_zip import record_bytes

    offsets = {s.offset for s in storages.values()}
    damaged = []
    for name, record in ckpt.records.items():
        if ckpt._index.source.origin(record.offset)[1] in offsets or record.crc is None:
            continue
        try:
            record_bytes(ckpt._index.source, record, limits)
        except FormatError:
            damaged.append(name)
    return damaged


def _inflates(packed: PackedBytes) -> bool:
    try:
        packed[:0]  # all of it is inflated, and checked
    except FormatError:
        return False
    return True


def _by_fingerprint(ckpt: Checkpoint, limits: Limits, progress: Progress) -> Report:
    stored = ckpt.metadata.get(FINGERPRINT)
    names = tuple(ckpt.tensors)
    if stored is None:
        return Report(ckpt.path, ckpt.format, (), names, 0)
    if fingerprint_of({**ckpt.tensors, **ckpt.ties}, limits, progress=progress) != stored:
        return Report(ckpt.path, ckpt.format, names, (), 0)
    return Report(ckpt.path, ckpt.format, (), (), len(names))
