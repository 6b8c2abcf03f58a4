"""What is copied is proved: by its storages' CRC-32s, or by the fingerprint that a safetensors file of ours says.

On the way, read once; but for storages that no tensor is all of, which are read again.
"""

from __future__ import annotations

from blake3 import blake3

from anycard.checkpoint import Checkpoint
from anycard.disk.pieces import Piece, watched
from anycard.errors import FormatError
from anycard.formats.safetensors import FINGERPRINT
from anycard.limits import DEFAULT
from anycard.names.fingerprint import fingerprint, tensor_line
from anycard.operations.fingerprinting import piece_of
from anycard.operations.sums import refuse_rot_in_parts
from anycard.tensors import TensorInfo

_CHUNK = 1 << 20


class Proof:
    """Gives the pieces to copy, and checks what they have shown once all is copied."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self._told = ckpt.metadata.get(FINGERPRINT) if ckpt.format == "safetensors" else None
        self._tensors = {**ckpt.tensors, **ckpt.ties} if self._told is not None else {}
        self._digests: dict[object, blake3] = {}
        self._copied: list[tuple[str, TensorInfo]] = []

    def piece(self, info: TensorInfo, name: str) -> Piece:
        """The tensor's bytes, which go through its digest or its CRC-32 when they are copied."""
        self._copied.append((name, info))
        piece = piece_of(info, name)
        if self._told is None:
            return piece
        digest = self._digests[info.place] = blake3()
        return watched(piece, digest.update)

    def check(self) -> None:
        """Compare, once all is copied; what the fingerprint covers and was not copied is read.

        Raises:
            FormatError: The file is damaged.
        """
        refuse_rot_in_parts(self._copied, DEFAULT)
        if self._told is None:
            return
        lines = {name: tensor_line(name, i.dtype, i.shape, self._hex(i, name)) for name, i in self._tensors.items()}
        if fingerprint(lines) != self._told:
            raise FormatError("a tensor is damaged: the fingerprint does not match. Nothing was written.")

    def _hex(self, info: TensorInfo, name: str) -> str:
        if info.place not in self._digests:
            for _ in self.piece(info, name).chunks(_CHUNK):
                pass
        return self._digests[info.place].hexdigest()
