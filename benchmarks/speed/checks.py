"""Whether a result is exact, byte for byte; runs outside of the clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from speed.subjects import Subject, described, file_digest

if TYPE_CHECKING:
    import torch

Act = Callable[[], Any]
Check = Callable[[Any], None]


class NotExactError(Exception):
    """A contestant's result differs from what the file holds."""


def same(subject: Subject, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every tensor is there, and each has the bytes, dtype and shape of the subject's.

    Raises:
        NotExactError: Names the first that do not.
    """
    wrong = sorted(subject.tensors.keys() ^ tensors.keys())
    wrong += [name for name, row in subject.tensors.items() if name in tensors and described(tensors[name]) != row]
    if wrong:
        raise NotExactError(f"{len(wrong)} tensors are not what the file holds: {', '.join(wrong[:5])}")


def same_module(subject: Subject) -> Check:
    """A check of the module that comes out."""
    return lambda module: same(subject, module.state_dict())


def cast_module(path: Path, dtype: str) -> Check:
    """A check of a module of another dtype than its file (a torch zip)."""

    def check(module: torch.nn.Module) -> None:
        import torch

        want, got = torch.load(path, weights_only=True, mmap=True), module.state_dict()
        if want.keys() != got.keys() or not all(
            torch.equal(got[n], t.to(getattr(torch, dtype))) for n, t in want.items()
        ):
            raise NotExactError(f"the tensors are not the file's as {dtype}")

    return check


def same_file(subject: Subject) -> Check:
    """A check of the file that comes out, by the library of its format."""

    def check(path: Path) -> None:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            same(subject, load_file(path))
        else:
            import torch

            same(subject, torch.load(path, weights_only=True, mmap=True))

    return check


def same_bytes(subject: Subject, kind: str) -> Check:
    """A check of a whole file's bytes, in memory or in a copy of the file."""

    def check(got: Any) -> None:
        digest = file_digest(got) if isinstance(got, Path) else blake3(got, max_threads=blake3.AUTO).hexdigest()
        if digest != subject.digests[kind]:
            raise NotExactError(f"the bytes are not those of the {kind} file")

    return check


def same_value(want: object, what: str) -> Check:
    """A check of a plain value."""

    def check(got: object) -> None:
        if got != want:
            raise NotExactError(f"{what}: {got!r} instead of {want!r}")

    return check


def fingerprint(subject: Subject) -> str:
    """The fingerprint by its definition (docs/fingerprint.md), without anycard."""
    digest = blake3()
    for name in sorted(subject.tensors, key=str.encode):
        row = [name, *subject.tensors[name]]
        digest.update(json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    return "blake3:" + digest.hexdigest()
