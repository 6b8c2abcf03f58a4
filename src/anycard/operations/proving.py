"""A safetensors file of ours says its own fingerprint: whatever is copied from it is proved on the way, read once."""

from __future__ import annotations

from blake3 import blake3

from anycard.checkpoint import Checkpoint
from anycard.disk.pieces import Piece, watched
from anycard.errors import FormatError
from anycard.formats.safetensors import FINGERPRINT
from anycard.names.fingerprint import fingerprint, tensor_line
from anycard.operations.fingerprinting import piece_of
from anycard.tensors import TensorInfo

_CHUNK = 1 << 20


class Proof:
    """Digests of what is copied; nothing is done where the file says no fingerprint."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self._told = ckpt.metadata.get(FINGERPRINT) if ckpt.format == "safetensors" else None
        self._tensors = {**ckpt.tensors, **ckpt.ties} if self._told is not None else {}
        self._digests: dict[object, blake3] = {}

    def piece(self, info: TensorInfo, name: str) -> Piece:
        """The tensor's bytes, which go through its digest when they are copied."""
        piece = piece_of(info, name)
        if self._told is None:
            return piece
        digest = self._digests[info.place] = blake3()
        return watched(piece, digest.update)

    def check(self) -> None:
        """Compare, once all is copied; what was not is read.

        Raises:
            FormatError: The file is damaged.
        """
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
