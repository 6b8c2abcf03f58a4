"""The fingerprint of weights, in any format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

from blake3 import blake3

from anycard.arguments import refuse_odd
from anycard.checkpoint import open_checkpoint, refuse_more_than_stored, tensor_bytes
from anycard.disk.pieces import FileRange, Lazy, Piece
from anycard.disk.threads import in_threads
from anycard.limits import DEFAULT, Limits
from anycard.names import fingerprint as lines
from anycard.operations.sums import refuse_rot_in_parts
from anycard.progress import Progress, counting
from anycard.tensors import TensorInfo

_CHUNK = 1 << 20  # bytes that are summed while they are in the processor's cache


def straight(info: TensorInfo) -> bool:
    """The tensor's row-major little-endian bytes lie in a file as they are."""
    storage = info.storage
    odd = info.conj or info.neg or storage.big_endian or storage.missing
    return not odd and info.contiguous and storage.source is not None and info.offset is not None


def piece_of(info: TensorInfo, name: str) -> Piece:
    """The tensor's row-major bytes: straight from the file where they lie there so, checked if they have a CRC."""
    storage = info.storage
    if straight(info):
        assert storage.source is not None and info.offset is not None
        whole = info.start == 0 and info.nbytes == storage.nbytes
        return FileRange(storage.source, info.offset, info.nbytes, name, storage.crc if whole else None)
    return Lazy(info.nbytes, lambda: tensor_bytes(info))


def fingerprint_of(tensors: Mapping[str, TensorInfo], limits: Limits = DEFAULT, *, progress: Progress = None) -> str:
    """`blake3:` and 64 hex digits of canonical name -> tensor; tied ones are read once.

    Raises:
        FormatError: One is damaged, or all together are far more than what is stored.
    """
    refuse_more_than_stored(tensors.values(), limits)
    names = {info.place: (name, info) for name, info in tensors.items()}
    digests: dict[object, str] = {}

    def work(named: tuple[str, TensorInfo]) -> None:
        digest = blake3()
        for chunk in piece_of(named[1], named[0]).chunks(_CHUNK):
            digest.update(chunk)
            done(len(chunk))
        digests[named[1].place] = digest.hexdigest()

    with counting(progress, sum(info.nbytes for _, info in names.values())) as done:
        in_threads(list(names.values()), work, limits.threads)
    refuse_rot_in_parts(tensors.items(), limits)
    made = {n: lines.tensor_line(n, info.dtype, info.shape, digests[info.place]) for n, info in tensors.items()}
    return lines.fingerprint(made)


def fingerprint(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    key: str | None = None,
    member: str | None = None,
    progress: Progress = None,
) -> str:
    """The fingerprint of a file's weights."""
    refuse_odd(key=key, member=member, progress=progress)
    with open_checkpoint(path, member=member) as ckpt:
        return ckpt.fingerprint(key, progress=progress)
