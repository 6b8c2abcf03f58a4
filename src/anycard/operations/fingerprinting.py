"""The fingerprint of weights, in any format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

from blake3 import blake3

from anycard.checkpoint import open_checkpoint, tensor_bytes
from anycard.limits import DEFAULT, Limits
from anycard.names import fingerprint as lines
from anycard.tensors import TensorInfo


def fingerprint_of(tensors: Mapping[str, TensorInfo], limits: Limits = DEFAULT) -> str:
    """`blake3:` and 64 hex digits of canonical name -> tensor."""
    made = {}
    for name, info in tensors.items():
        digest = blake3(tensor_bytes(info, limits), max_threads=limits.threads).hexdigest()
        made[name] = lines.tensor_line(name, info.dtype, info.shape, digest)
    return lines.fingerprint(made)


def fingerprint(path: str | os.PathLike[str] | BinaryIO, *, key: str | None = None, member: str | None = None) -> str:
    """The fingerprint of a file's weights."""
    with open_checkpoint(path, member=member) as ckpt:
        return ckpt.fingerprint(key)
