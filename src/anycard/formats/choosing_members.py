"""Which of the checkpoints inside a folder or an archive is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from anycard.errors import ChoiceError, FormatError
from anycard.formats.registry import SUFFIXES
from anycard.pickles.views import short

# What may hold weights, by its suffix; a Python pickle may hold anything, but little else is called so.
_SUFFIXES = (*SUFFIXES, ".pt2", ".jit", ".model", ".nemo", ".th", ".weights", ".pickle", ".tar", ".zip", ".gz", ".tgz")
# What lies beside weights and is called like them.
_BESIDE = re.compile(
    r"optim|scheduler|scaler|training_args|rng_state|random_states|pytorch_variables|sampler|trainer_state|dataloader",
    re.IGNORECASE,
)
# Where several of these lie together, they hold the same weights, and the first is the one that people load.
_KNOWN = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin", "model_weights.ckpt", "policy.pth",
)  # fmt: skip


def may_be(name: str) -> bool:
    """A file of this name may be a checkpoint."""
    return name.lower().endswith(_SUFFIXES) and not name.rpartition("/")[2].startswith("._")


def meant(labels: Sequence[str], owner: str, inside: Sequence[str]) -> str:
    """The label that is meant: the only one, or the one that people load.

    Args:
        inside: All that the owner holds, to be named where there is no checkpoint.

    Raises:
        ChoiceError: Several could be.
        FormatError: There is none.
    """
    if not labels:
        held = ", ".join(short(name) for name in inside[:12]) or "nothing"
        raise FormatError(f"{owner} holds no checkpoint that anycard knows; it holds {held}", path=owner)
    left = [label for label in labels if not _BESIDE.search(label.rpartition("/")[2])] or list(labels)
    if len(left) == 1:
        return left[0]
    known = [name for name in _KNOWN if name in left]
    if known:
        return known[0]
    raise ChoiceError(
        f"{owner} holds {len(labels)} checkpoints: {listed(labels)}. Pick one with member=, "
        f"for example member={left[0]!r}",
        path=owner,
    )


def no_member(member: str, labels: Sequence[str], owner: str) -> ChoiceError:
    """The error for a member that is not there."""
    return ChoiceError(f"{owner} has no member {short(member)!r}; it holds {listed(labels) or 'none'}", path=owner)


def listed(names: Sequence[str], most: int = 30) -> str:
    """Names for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(short(name)) for name in names[:most]) + more
