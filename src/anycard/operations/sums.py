"""CRC-32s of storages: each read once, from its own file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from zlib_ng import zlib_ng

from anycard.disk.pieces import FileRange
from anycard.disk.threads import in_threads
from anycard.errors import FormatError
from anycard.formats.assembled import Assembled
from anycard.limits import Limits
from anycard.tensors import Storage, TensorInfo

_CHUNK = 1 << 20  # bytes that are summed while they are in the processor's cache


def stored(storage: Storage) -> Iterable[Storage]:
    """The storages that lie in files: of a tensor in chunks, those of all chunks."""
    return storage.source.storages if isinstance(storage.source, Assembled) else (storage,)


def has_sum(storage: Storage) -> bool:
    """Its bytes lie in a file, which says their CRC-32."""
    return storage.crc is not None and storage.offset is not None


def crc_of(storage: Storage, done: Callable[[int], None] = lambda nbytes: None) -> int:
    """The CRC-32 of what is there."""
    assert storage.source is not None and storage.offset is not None
    crc = 0
    for chunk in FileRange(storage.source, storage.offset, storage.nbytes).chunks(_CHUNK):
        crc = zlib_ng.crc32(chunk, crc)
        done(len(chunk))
    return crc


def refuse_rot_in_parts(tensors: Collection[tuple[str, TensorInfo]], limits: Limits) -> None:
    """Check the storages of which no tensor is all, so that no read of one has checked them.

    Raises:
        FormatError: One is damaged; names a tensor of it.
    """
    whole = {id(info.storage) for _, info in tensors if not info.start and info.span == info.storage.nbytes}
    parts: dict[int, tuple[str, Storage]] = {}
    for name, info in tensors:
        for storage in stored(info.storage) if info.nbytes else ():
            if has_sum(storage) and id(storage) not in whole:
                parts[id(storage)] = name, storage

    def check(part: tuple[str, Storage]) -> None:
        name, storage = part
        if crc_of(storage) != storage.crc:
            message = f"{name} or what shares its memory is damaged: its CRC-32 does not match"
            raise FormatError(message, name=name, offset=storage.offset)

    in_threads(list(parts.values()), check, limits.threads)
