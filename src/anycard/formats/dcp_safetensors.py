"""DCP in safetensors: a file of chunks for each rank, each file with where its chunks begin.

Source: torch/distributed/checkpoint/hf_storage.py, _hf_utils.py (`HuggingFaceStorageWriter`, distributed,
not consolidated). Nothing in the files says how many ranks there were, nor how large a tensor is: a tensor
goes as far as its chunks go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from anycard.disk.folder import Folder
from anycard.errors import FormatError
from anycard.formats import safetensors
from anycard.formats.assembled import Chunk, Prover, assemble
from anycard.formats.index import Index
from anycard.limits import Limits
from anycard.pickles.views import MOST_ELEMENTS, short

SHARD = re.compile(r"shard-(?P<rank>\d{5,6})-model-\d{5,6}-of-\d{5,6}\.safetensors")
_OFFSETS = "DCP_SHARDING_INFO"


def read_index(folder: Folder, files: Sequence[str], limits: Limits) -> Index:
    """The index of all ranks' files.

    Raises:
        FormatError: A rank's file is missing between others, or chunks do not make a tensor.
    """
    ranks = {int(found["rank"]) for name in files if (found := SHARD.fullmatch(name.rpartition("/")[2]))}
    missing = [str(rank) for rank in range(1, max(ranks)) if rank not in ranks][:20]
    if missing:
        raise FormatError(f"{folder.name} lacks the files of shard {', '.join(missing)}", path=folder.name)
    chunks: dict[str, list[Chunk]] = {}
    for name in files:
        source = folder.open(name)
        try:
            shard = safetensors.read_index(source, limits)
            offsets = _offsets(shard.metadata.get(_OFFSETS))
            for tensor, info in shard.tree.items():
                chunks.setdefault(tensor, []).append(Chunk(_begin(offsets, tensor, len(info.shape)), info))
        except FormatError as error:
            error.path = error.path or source.name
            raise
    prover = Prover()
    tree = {name: _whole(folder, name, held, prover) for name, held in chunks.items()}
    return Index("DCP", tree, folder)


def _offsets(text: Any) -> dict[str, Any]:
    try:
        held = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise FormatError("the file does not say where its chunks begin", offset=8)
    return held


def _begin(offsets: dict[str, Any], name: str, rank: int) -> tuple[int, ...]:
    held = offsets.get(name)
    at = held.get("saved_offsets") if isinstance(held, dict) else None
    good = isinstance(at, list) and len(at) == rank and all(type(v) is int and 0 <= v < MOST_ELEMENTS for v in at)
    if not good or at is None:
        raise FormatError(f"the file does not say where {short(name)!r} begins", offset=8, name=short(name))
    return tuple(at)


def _whole(folder: Folder, name: str, chunks: list[Chunk], prover: Prover) -> Any:
    dtype = chunks[0].info.dtype
    if any(c.info.dtype != dtype or len(c.offsets) != len(chunks[0].offsets) for c in chunks):
        raise FormatError(f"the chunks of {short(name)!r} do not go together", path=folder.name, name=short(name))
    ends = [[at + size for at, size in zip(c.offsets, c.info.shape, strict=True)] for c in chunks]
    shape = tuple(max(column) for column in zip(*ends, strict=True))
    if not all(c.info.numel for c in chunks) and 0 in shape:
        return chunks[0].info
    return assemble(short(name), folder, dtype, shape, chunks, prover)
