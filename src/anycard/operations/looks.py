"""What bytes and names look like to a scan: which may be pickles, or hold some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from anycard.containers.streams import kind_of
from anycard.containers.tar_directory import is_tar
from anycard.containers.zip_directory import read_directory
from anycard.disk.source import Source, WindowSource
from anycard.errors import FormatError
from anycard.formats import safetensors
from anycard.formats.registry import LEGACY
from anycard.limits import Limits
from anycard.operations.archived_code import Context
from anycard.pickles.judging import RUNS, judge
from anycard.pickles.outline import Outline

# Names of files that people load as pickles.
NAMED = (".pkl", ".pickle", ".p", ".pt", ".pth", ".bin", ".ckpt", ".dill", ".joblib", ".distcp")
_PACKED = re.compile(r"\.(gz|bz2|xz|lzma|zst|zstd|z|lz4)$")
_NUMPY = b"\x93NUMPY"
_ZIP = (b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\7\x08")
_LZ4 = b"\x04\x22\x4d\x18"  # joblib reads it where the package is there
_OLD_JOBLIB = (b"ZF0x", 21)  # how it begins, and where its zlib stream does, maybe behind a blank
_PROTO = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))  # no pickler writes it below 2
_STORAGE = re.compile(
    r"(^|/)(\.?data/\d+(\.storage)?|constants/\d+|data/weights/weight_\d+|data/constants/tensor_\d+)$"
)
_MOST_ARCHIVES = 10_000
_MOST_VAIN = 16  # end records that end no archive, before one does
_MOST_HEADER = 64 << 10
_DESCRIPTION = re.compile(rb"'descr'\s*:\s*(.{1,65536}?),\s*'fortran_order'", re.DOTALL)


def raw_folders(names: Iterable[str]) -> frozenset[str]:
    """The folders of an archive whose numbered records torch takes for the bytes of storages, and for nothing else."""
    pickles = (name[: -len(".pkl")] for name in names if name == "data.pkl" or name.endswith("/data.pkl"))
    packages = (name[: -len("/extern_modules")] for name in names if name.endswith(".data/extern_modules"))
    return frozenset((*pickles, *packages))


def is_raw(name: str, folders: frozenset[str]) -> bool:
    """A record of a tensor's bytes, in one of those folders."""
    folder, _, last = name.rpartition("/")
    return folder in folders and last.removesuffix(".storage").isdecimal()


def begins_loaded(head: bytes) -> bool:
    """Whoever loads it takes it for an array, an archive or a pickle, whatever it is called."""
    return head.startswith((_NUMPY, *_ZIP, *_PROTO)) or is_legacy(head)


def told_by(name: str, head: bytes, context: Context) -> Context:
    """A member that neither its name nor PROTO tells to be a pickle may be anything; storages begin with any byte."""
    plain = _PACKED.sub("", name.lower())
    begins = (head.startswith(_PROTO) or is_legacy(head)) and not _STORAGE.search(name)
    return context._replace(tentative=not plain.endswith(NAMED) and not begins, joblib=plain.endswith(".joblib"))


def formats_of(source: Source, head: bytes, limits: Limits) -> list[str]:
    """What the first bytes, up to 512, say that it is: several, as readers look at different ones of them."""
    safe = is_safetensors(source, head, limits)
    told = {
        "safetensors": safe,
        "zip": head.startswith(_ZIP),
        "packed": bool(kind_of(head)) and not safe,
        "lz4": head.startswith(_LZ4),
        "joblib": head.startswith(_OLD_JOBLIB[0]),
        "npy": head.startswith(_NUMPY),
        "tar": is_tar(head),
    }
    return [name for name, is_it in told.items() if is_it]


def join(where: str, name: str) -> str:
    """A record's path within the files that hold it."""
    return f"{where}/{name}" if where else name


def zips_within(source: Source, limits: Limits) -> Iterator[Source]:
    """The archives that a file is made of, one after the other without a gap; none where that is not so."""
    data = source.read(0, min(source.size, limits.index_nbytes))
    parts: list[Source] = []
    start = end = vain = 0
    for _ in range(_MOST_ARCHIVES):
        end = data.find(b"PK\x05\x06", end)
        if end < 0:
            break
        end += 22
        part = WindowSource(source, start, min(end, source.size) - start)
        try:
            read_directory(part, limits)
        except FormatError:
            vain += 1
            if vain > _MOST_VAIN:  # each may look through one large directory
                break
            continue
        parts.append(part)
        start, vain = end, 0
    if start == source.size:
        yield from parts


def starts_pickle(data: bytes, at: int) -> bool:
    """PROTO stands there."""
    return data.startswith(_PROTO, at)


def behind_header(source: Source) -> tuple[Source, bool] | None:
    """What stands behind a `.npy` file's header, and whether it says objects; None where it cannot be read."""
    if source.size < 12:
        return None
    wide = 4 if source.read(6, 1) >= b"\2" else 2
    start = 8 + wide + int.from_bytes(source.read(8, wide), "little")
    if start > min(source.size, _MOST_HEADER):
        return None
    header = source.read(8 + wide, start - 8 - wide)
    described = _DESCRIPTION.match(header, max(header.find(b"'descr'"), 0))
    return None if described is None else (WindowSource(source, start, source.size - start), b"O" in described[1])


def old_joblib(source: Source) -> Source:
    """The zlib stream in a file of joblib's before 0.10."""
    start = min(_OLD_JOBLIB[1], source.size)
    start += source.read(start, min(1, source.size - start)) == b" "
    return WindowSource(source, start, source.size - start)


def is_legacy(data: bytes) -> bool:
    """A torch file from before 1.6."""
    return LEGACY.match(data) is not None


def tells(found: Outline, size: int) -> bool:
    """It is a pickle, and names something: text that begins with a c names something, too, but does nothing with it."""
    kinds = {judge(*place) for place in found.globals}
    return found.torn or (bool(kinds) and (found.calls or RUNS in kinds or found.end == size))


def is_safetensors(source: Source, head: bytes, limits: Limits) -> bool:
    """Its header can be read; what a length of a few bytes looks like (a pickle's, zlib's or a zip's magic) is chance.

    Zeros and JSON are no stream of zlib, bz2 or lzma; gzip's third byte must be 8.
    """
    if head[8:9] != b"{" or head.startswith(b"\x1f\x8b\x08"):
        return False
    try:
        safetensors.read_index(source, limits)
    except FormatError:
        return False
    return True
