"""Checkpoints in several files: Hugging Face's index and shards, or shards alone.

Source: huggingface_hub `serialization/_base.py` (`split_state_dict_into_shards_factory`), transformers
`load_sharded_checkpoint`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anycard.disk.folder import Folder, plain_parts
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.formats.index import Index
from anycard.formats.registry import read_file_index
from anycard.limits import Limits
from anycard.pickles.views import short
from anycard.tensors import TensorInfo

INDEX = (".safetensors.index.json", ".bin.index.json")
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})(?P<suffix>\.safetensors|\.bin)")
_MOST_INDEX = 256 << 20
_MOST_SHARDS = 10_000


def is_part(source: Source) -> bool:
    """The file, called like an index, holds a JSON object."""
    return source.read(0, min(source.size, 64)).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def read_part(folder: Folder, source: Source, limits: Limits) -> Index:
    """The index of the shards that an index file names.

    Raises:
        FormatError: Malformed; a shard is missing, or lacks what the index says of it (all are named).
    """
    held = _parsed(source, limits)
    weight_map = held.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError("the index has no weight_map from names to files", path=source.name, offset=0)
    files = list(dict.fromkeys(weight_map.values()))
    if len(files) > _MOST_SHARDS or len(weight_map) > limits.records:
        raise FormatError("the index names more files or tensors than any model has", path=source.name, offset=0)
    for name in files:
        plain_parts(name, source.name)
    missing = [name for name in files if not folder.has(name)]
    if missing:
        raise FormatError(
            f"{source.name} names {len(files)} shards, and {_listed(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not there: download them again, or the index is of another copy (without it, complete shards are read)",
            path=source.name,
            name=missing[0],
        )
    metadata = held.get("metadata")
    return _joined(folder, files, weight_map, metadata if isinstance(metadata, dict) else {}, source.name, limits)


def _parsed(source: Source, limits: Limits) -> dict[str, Any]:
    if source.size > min(_MOST_INDEX, limits.index_nbytes):
        raise FormatError(f"an index of {source.size:,} bytes", path=source.name, offset=0)
    data = source.read(0, source.size)
    try:
        held = json.loads(data)
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", getattr(error, "start", 0))
        raise FormatError(f"the index is no valid JSON: {str(error)[:200]}", path=source.name, offset=at) from None
    if not isinstance(held, dict):
        raise FormatError("the index is no JSON object", path=source.name, offset=0)
    return held


def unindexed(folder: Folder, names: Sequence[str], limits: Limits) -> Index:
    """The index of shards of one set that no index file names.

    Raises:
        FormatError: A number of the set is missing; the absent files are named.
    """
    found = SHARD.fullmatch(names[0])
    assert found is not None
    total, width = int(found["total"]), len(found["number"])
    there = {int(m["number"]) for n in names if (m := SHARD.fullmatch(n))}
    missing = []
    for number in range(1, total + 1):
        if number not in there:
            missing.append(f"{found['stem']}-{number:0{width}}-of-{found['total']}{found['suffix']}")
        if len(missing) > 100:
            break
    if missing:
        raise FormatError(
            f"{folder.name} lacks {_listed(missing)}: {len(there)} of {total} shards are there",
            path=folder.name,
            name=missing[0],
        )
    return _joined(folder, sorted(names), {}, {}, folder.name, limits)


def _joined(
    folder: Folder, files: Sequence[str], weight_map: Mapping[str, str], metadata: dict[str, Any], owner: str,
    limits: Limits,
) -> Index:  # fmt: skip
    """One tree of all shards' tensors; where a name is in several, the index says which is meant."""
    tree: dict[str, Any] = {}
    kinds: set[str] = set()
    kept: dict[str, Any] = {}
    for file in files:
        shard = _shard(folder, file, limits)
        kinds.add(shard.format)
        kept.update({k: v for k, v in shard.metadata.items() if not k.startswith("anycard")})
        for name, value in shard.tree.items():
            if not isinstance(name, str):
                raise FormatError(f"the shard {file} holds a name that is no text", path=owner, name=file)
            meant = weight_map.get(name, file)
            if meant == file and tree.setdefault(name, value) is not value:
                raise FormatError(f"{short(name)!r} is in several shards", path=owner, name=name)
    absent = [name for name in weight_map if name not in tree]
    if absent:
        raise FormatError(
            f"{owner} is stale: {len(absent)} tensors are not in the shards that it names, "
            f"for example {short(absent[0])!r} in {weight_map[absent[0]]}",
            path=owner,
            name=absent[0],
        )
    kind = "sharded safetensors" if kinds == {"safetensors"} else "sharded torch"
    ordered = {name: tree[name] for name in weight_map}
    return Index(kind, {**ordered, **tree}, folder, {**kept, **metadata})


def _shard(folder: Folder, name: str, limits: Limits) -> Index:
    source = folder.open(name)
    if isinstance(source, Folder):
        raise FormatError(f"the shard {name} is a folder", path=folder.name, name=name)
    shard = read_file_index(source, limits)
    if not isinstance(shard.tree, Mapping) or not any(isinstance(v, TensorInfo) for v in shard.tree.values()):
        raise FormatError(f"the shard {name} holds no state dict", path=source.name, name=name)
    return shard


def _listed(names: Sequence[str]) -> str:
    more = "" if len(names) <= 8 else f" and {'over 90' if len(names) > 100 else len(names) - 8} more"
    return ", ".join(names[:8]) + more
