"""The models, their files as the usual libraries write them, and what every tensor must be, bit for bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import torch

FILES = {"pth": "model.pth", "safetensors": "model.safetensors", "tensorizer": "model.tensors"}


@dataclass(frozen=True)
class Model:
    """A model to build: a stack of Linear layers, or torchvision's resnet152 (no layers)."""

    layers: int = 0
    width: int = 0
    dtype: str = "float32"
    bias: bool = True

    def factory(self) -> Callable[[], torch.nn.Module]:
        """What builds it, as users have it: imported."""
        if self.layers:
            return self._stack
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*image Python extension.*")
            from torchvision.models import resnet152
        return resnet152  # type: ignore[no-any-return]

    def _stack(self) -> torch.nn.Module:
        import torch

        kind = getattr(torch, self.dtype)
        each = [torch.nn.Linear(self.width, self.width, self.bias, dtype=kind) for _ in range(self.layers)]
        return torch.nn.Sequential(*each)


@dataclass(frozen=True)
class Subject:
    """A model with files in a folder.

    Attributes:
        tensors: name -> [dtype, shape, BLAKE3 of its bytes].
        digests: kind of file -> BLAKE3 of the file.
        nbytes: All tensors together.
    """

    folder: Path
    model: Model
    tensors: Mapping[str, list[Any]]
    digests: Mapping[str, str]
    nbytes: int

    def path(self, kind: str) -> Path:
        """Where a kind of file lies."""
        return self.folder / FILES[kind]

    @classmethod
    def of(cls, folder: Path) -> Subject:
        """What `make` left in a folder."""
        data = json.loads((folder / "subject.json").read_text())
        return cls(folder, Model(**data["model"]), data["tensors"], data["digests"], data["nbytes"])


def make(folder: Path, model: Model) -> None:
    """Write the torch zip and the safetensors file of a model, and what is in them."""
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    weights = model.factory()().state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / FILES["pth"])
    safetensors.torch.save_file(dict(weights), folder / FILES["safetensors"], {"format": "pt"})
    data = {
        "model": vars(model),
        "tensors": {name: described(tensor) for name, tensor in weights.items()},
        "digests": {kind: file_digest(folder / FILES[kind]) for kind in ("pth", "safetensors")},
        "nbytes": sum(tensor.nbytes for tensor in weights.values()),
    }
    (folder / "subject.json").write_text(json.dumps(data))


def make_tensorizer(folder: Path) -> None:
    """tensorizer's own file of the same model; runs where tensorizer is installed."""
    import torch
    from tensorizer import TensorSerializer

    subject = Subject.of(folder)
    model = subject.model.factory()()
    model.load_state_dict(torch.load(subject.path("pth"), weights_only=True))
    serializer = TensorSerializer(str(subject.path("tensorizer")))
    serializer.write_module(model)
    serializer.close()


def described(tensor: torch.Tensor) -> list[Any]:
    """dtype, shape and the digest of the bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = blake3(flat, max_threads=blake3.AUTO).hexdigest()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest]


def file_digest(path: Path) -> str:
    """BLAKE3 of a file."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
