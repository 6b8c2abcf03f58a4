"""DeepSpeed's ZeRO folders: the model's own weights, and the fp32 masters put together from the ranks' parts.

The writer makes what DeepSpeed 0.19.8 leaves (names, groups, padding, seen on two processes): every file of it was
compared with what DeepSpeed's own zero_to_fp32.py makes of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from anycard.errors import ChoiceError
from helpers import assert_same, filled, unchanged, weights

MASTERS = "zero_fp32_masters"


class Net(nn.Module):
    """Odd sizes, a buffer, a tied tensor, a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.body = nn.Linear(5, 9)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


WANT = weights(filled(Net()))
HALF = {name: t.bfloat16() if t.is_floating_point() else t for name, t in WANT.items()}
FROZEN = ("frozen.weight", "frozen.bias")
MIXED = {**WANT, **{name: HALF[name] for name in HALF if name in FROZEN or "running" in name}}
GROUPS = (("embed.weight", "body.weight"), ("norm.weight", "norm.bias", "body.bias"))
Parts = list[list[torch.Tensor]]  # of each rank, by group


def groups_cut(ranks: int) -> Parts:
    """ZeRO-1 and 2: a group is one vector, padded to twice the ranks; the padding itself is not saved."""
    made: Parts = [[] for _ in range(ranks)]
    for group in GROUPS:
        vector = torch.cat([WANT[name].flatten() for name in group])
        each = -(-len(vector) // (2 * ranks)) * 2
        for rank in range(ranks):
            made[rank].append(vector[rank * each : (rank + 1) * each].clone())
    return made


def cut(tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """ZeRO-3: equal parts, padded with what must not be read."""
    each = -(-tensor.numel() // ranks)
    padded = torch.full((each * ranks,), 77, dtype=tensor.dtype)
    padded[: tensor.numel()] = tensor.flatten()
    return [part.clone() for part in padded.chunk(ranks)]


def parameters_cut(ranks: int) -> Parts:
    """ZeRO-3: each parameter's parts; two vectors a rank, as DeepSpeed's sub-groups may end within a parameter."""
    lines = [torch.cat([cut(WANT[name], ranks)[rank] for group in GROUPS for name in group]) for rank in range(ranks)]
    return [[line[:11].clone(), line[11:].clone()] for line in lines]


def zero_folder(folder: Path, stage: int = 2, ranks: int = 2, change: Callable[[dict[str, Any]], None] = dict) -> Path:
    """A run's folder with one step; `change` may spoil what goes into each file."""
    step = folder / "global_step10"
    step.mkdir(parents=True)
    names = [name for name in WANT if "running" in name or "num_batches" in name]
    common = {
        "buffer_names": names, "optimizer": None, "global_steps": 10, "dp_world_size": ranks, "ds_version": "0.19.8",
        "param_shapes": [OrderedDict((name, WANT[name].shape) for name in group) for group in GROUPS],
        "frozen_param_shapes": OrderedDict((name, WANT[name].shape) for name in FROZEN),
        "shared_params": {"head.weight": "embed.weight"},
    }  # fmt: skip
    for rank in range(ranks if stage == 3 else 1):
        whole = {name: t if name in names or stage < 3 else torch.empty(0, dtype=t.dtype) for name, t in HALF.items()}
        fragments = {n: cut(HALF[n], ranks)[rank] if stage == 3 else HALF[n] for n in FROZEN}
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        saved = {"module": OrderedDict(whole), "frozen_param_fragments": OrderedDict(fragments), **common}
        change(saved)
        torch.save(saved, step / f"{prefix}mp_rank_00_model_states.pt")
    parts = parameters_cut(ranks) if stage == 3 else groups_cut(ranks)
    for rank in range(ranks):
        masters: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks] * 2}
        masters["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = parts[rank]
        state = {
            "optimizer_state_dict": {**masters, "base_optimizer_state": {"state": {0: {"exp_avg": torch.ones(9)}}}}
        }
        change(state)
        torch.save(state, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step10")
    (folder / "zero_to_fp32.py").write_text("")
    return folder


def test_own_weights_are_the_default(tmp_path: Path) -> None:
    """With ZeRO-1 and 2 the model's file has them whole; the masters are named."""
    folder = zero_folder(tmp_path / "run")
    for path in (folder, folder / "global_step10"):
        assert_same(anycard.read(path), HALF)
        with anycard.open(path) as ckpt:
            assert "embed.weight" in ckpt.metadata[MASTERS]
            assert len(ckpt.metadata["zero_fp32_files"]) == 2
    (folder / "global_step20").mkdir()
    torch.save({"module": WANT}, folder / "global_step20" / "mp_rank_00_model_states.pt")
    assert_same(anycard.read(folder), HALF)  # `latest` decides
    assert_same(anycard.read(folder, member="global_step20"), WANT)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_are_put_together(tmp_path: Path, stage: int, ranks: int) -> None:
    """Every bit of them, under the model's names, ties included; buffers and what is not trained as they are."""
    folder = zero_folder(tmp_path / "run", stage, ranks)
    for path in (folder, folder / "global_step10"):
        got = anycard.read(path, member=MASTERS)
        assert list(got) == list(WANT)
        assert_same(got, MIXED)
        assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr()
    assert_same(weights(anycard.load(folder, Net, member=MASTERS)), {n: t.float() if t.is_floating_point() else t
                                                                    for n, t in MIXED.items()})  # fmt: skip
    report = anycard.verify(folder, member=MASTERS)
    assert report.ok and report.checked == len(WANT)
    anycard.convert(folder, tmp_path / "out.safetensors", member=MASTERS)
    assert_same(anycard.read(tmp_path / "out.safetensors"), MIXED)


def test_no_whole_parameter_no_choice(tmp_path: Path) -> None:
    """ZeRO-3 keeps nothing but the masters: they are what the folder holds."""
    folder = zero_folder(tmp_path / "run", 3)
    assert_same(anycard.read(folder), MIXED)
    with anycard.open(folder / "global_step10") as ckpt:
        assert ckpt.format == "DeepSpeed ZeRO" and ckpt.metadata["ds_version"] == "0.19.8"


def _shape(held: dict[str, Any]) -> None:
    for group in held.get("param_shapes", []):
        for name in group:
            group[name] = torch.Size([90])


def _moved(held: dict[str, Any]) -> None:
    for name in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        for index, part in enumerate(held.get("optimizer_state_dict", {}).get(name, [])):
            held["optimizer_state_dict"][name][index] = part.half()


def _padded(held: dict[str, Any]) -> None:
    held.get("optimizer_state_dict", {})["param_alignment_paddings"] = [[0, 3]]


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "other shapes": _shape,
    "no shapes": lambda held: held.update(param_shapes=None),
    "a shape of text": lambda held: held.update(param_shapes=[{"a": "b"}] * 2),
    "a name twice": lambda held: held.update(param_shapes=[{"embed.weight": torch.Size([7, 5])}] * 2),
    "another dtype": _moved,
    "padding between": _padded,
    "no masters": lambda held: held.update(optimizer_state_dict={}),
    "no dict": lambda held: held.update(optimizer_state_dict=3),
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lie", LIES)
def test_files_that_do_not_go_together(tmp_path: Path, lie: str, stage: int) -> None:
    """FormatError, and the model is as it was."""
    folder = zero_folder(tmp_path / "run", stage, change=LIES[lie])
    model = filled(Net(), 3)
    with unchanged(model), pytest.raises(anycard.FormatError):
        anycard.load(folder, model, member=MASTERS)


def test_counts_that_hold_themselves_many_times(tmp_path: Path) -> None:
    """Refused at once and in few words."""
    bomb: Any = ["x"]
    for _ in range(12):
        bomb = [bomb] * 10
    folder = zero_folder(
        tmp_path / "run", change=lambda held: held.get("optimizer_state_dict", {}).update(partition_count=bomb)
    )
    with pytest.raises(anycard.FormatError, match="some are missing") as caught:
        anycard.read(folder, member=MASTERS)
    assert len(str(caught.value)) < 1_000


def test_ties_that_are_no_names(tmp_path: Path) -> None:
    """Lists, and tuples of tuples that take forever to hash: passed over."""
    bomb: Any = ("x",)
    for _ in range(60):
        bomb = (bomb, bomb)
    ties = {"head.weight": "embed.weight", "v": bomb, "w": [1]}
    folder = zero_folder(tmp_path / "run", change=lambda held: held.update(shared_params=ties))
    assert torch.equal(anycard.read(folder, member=MASTERS)["head.weight"], WANT["head.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_are_missing(tmp_path: Path, stage: int) -> None:
    """Named, whether the gap shows or only the count tells it."""
    step = zero_folder(tmp_path / "run", stage, 3) / "global_step10"
    file = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    kept = (step / file.format(2)).read_bytes()
    (step / file.format(2)).unlink()
    with pytest.raises(anycard.FormatError, match="2 ranks"):
        anycard.read(step, member=MASTERS)
    (step / file.format(2)).write_bytes(kept)
    (step / file.format(1)).unlink()
    with pytest.raises(anycard.FormatError, match="rank 1"):
        anycard.read(step, member=MASTERS)


def test_a_parameter_without_master(tmp_path: Path) -> None:
    """ZeRO-3 leaves nothing in its place: refused by name. With ZeRO-2 it is as the model's file has it."""
    extra = {"mask": torch.empty(0)}

    def change(held: dict[str, Any]) -> None:
        held.setdefault("module", {}).update(extra)

    with pytest.raises(anycard.FormatError, match="mask"):
        anycard.read(zero_folder(tmp_path / "3", 3, change=change))
    assert_same(anycard.read(zero_folder(tmp_path / "2", 2, change=change), member=MASTERS), {**MIXED, **extra})


def test_other_parallelism_is_not_put_together(tmp_path: Path) -> None:
    """With tensor parallelism each file has a part that no shape here tells; the error says so."""
    step = zero_folder(tmp_path / "run", 3) / "global_step10"
    name = "zero_pp_rank_0_mp_rank_01_model_states.pt"
    (step / name).write_bytes((step / name.replace("_01_", "_00_")).read_bytes())
    with pytest.raises(anycard.FormatError, match="parallelism"):
        anycard.read(step)


def test_no_zero_folder_has_no_masters(tmp_path: Path) -> None:
    """Asked for where there are none."""
    torch.save(WANT, tmp_path / "a.pt")
    with pytest.raises(ChoiceError, match=MASTERS):
        anycard.read(tmp_path, member=MASTERS)
