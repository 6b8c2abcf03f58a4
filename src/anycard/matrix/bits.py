"""Tensors as bits: seeded values, poison, comparison. Bits, not `==`: NaN and -0.0 count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from blake3 import blake3

from anycard.matrix.results import EXACT, NOTHING, Outcome

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SEED = 20240229


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, by name; extra state that is no tensor is left out."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def scramble(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give every tensor seeded random values, buffers too, so that no default passes by accident."""
    generator = torch.Generator().manual_seed(_SEED)
    for tensor in tensors_of(module).values():
        tensor.copy_(_random_like(tensor, generator))
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}


def _random_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator)
    if tensor.is_complex():
        return torch.randn(tensor.shape, generator=generator, dtype=torch.complex64)
    high = 2 if tensor.dtype == torch.bool else 100
    return torch.randint(0, high, tensor.shape, generator=generator)


@torch.no_grad()
def refill(module: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors_of(module).items():
        tensor.copy_(expected[name])


@torch.no_grad()
def poison(module: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    """Make every tensor wrong, so that what stays untouched cannot pass for loaded."""
    for name, tensor in tensors_of(module).items():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        else:
            tensor.copy_(expected[name].bitwise_not())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_as_whole_numbers(one), _as_whole_numbers(other))


def digest(expected: Mapping[str, torch.Tensor]) -> str:
    """One hash for all names and bytes: whether two processes hold the same weights."""
    hasher = blake3()
    for name, tensor in expected.items():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def judge(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], prefix: str, seconds: float
) -> Outcome:
    """Hold what was loaded against what was saved; `prefix` is what the column's own wrapper adds."""
    carried = _carried(list(found), [prefix + name for name in expected], prefix)
    if carried is None:
        return Outcome(f"other names: {_odd_name(found, expected, prefix)}", "other names", seconds)
    pairs = [(name, found[prefix + carried + name], tensor) for name, tensor in expected.items()]
    differing = [name for name, got, want in pairs if not same_bits(got, want)]
    if not differing:
        words = f"names carry {carried}" if carried else EXACT
        return Outcome(words, words, seconds)
    if all(_untouched(got, want) for _, got, want in pairs):
        return Outcome(NOTHING, NOTHING, seconds)
    words = f"{len(differing)} of {len(expected)} tensors differ"
    return Outcome(f"{words}, the first is {differing[0]}", words, seconds)


def _carried(found: list[str], wanted: list[str], prefix: str) -> str | None:
    """What each name has between the column's prefix and itself; None where the names do not fit."""
    if set(found) == set(wanted):
        return ""
    if len(found) != len(wanted) or not found:
        return None
    bare = [name[len(prefix) :] for name in wanted]
    carried = found[0][len(prefix) : len(found[0]) - len(bare[0])]
    return carried if {prefix + carried + name for name in bare} == set(found) else None


def _odd_name(found: Mapping[str, object], expected: Mapping[str, object], prefix: str) -> str:
    wanted = [prefix + name for name in expected]
    missing = [f"{name} is missing" for name in wanted if name not in found]
    return (missing or [f"{name} is not the model's" for name in found if name not in set(wanted)])[0]


def _untouched(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.is_floating_point() or got.is_complex():
        return bool(got.isnan().all())
    return same_bits(got, want.bitwise_not())


def _as_whole_numbers(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.view(_WHOLE_NUMBERS[plain.element_size()])
