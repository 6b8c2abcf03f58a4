"""torch's own modules that do more than copy: norms with computed weights, lazy layers, batch norm's counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import anycard
from helpers import assert_same, assert_same_bits, both, filled, refused, weights


def nested_norms(kind: str) -> nn.Module:
    wn = nn.utils.parametrizations
    return {
        "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)),
        "weight norm": lambda: nn.Sequential(wn.weight_norm(nn.Linear(3, 2), dim=None), nn.Linear(2, 2)),
        "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 3, 2)), nn.BatchNorm2d(3)),
        "spectral norm": lambda: nn.Sequential(wn.spectral_norm(nn.Conv2d(2, 3, 2)), nn.BatchNorm2d(3)),
        "orthogonal": lambda: nn.Sequential(wn.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 1)),
        "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        "sync batch norm": lambda: nn.Sequential(nn.SyncBatchNorm(3)),
        "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3),
        "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
        "lstm": lambda: nn.LSTM(3, 2, 2, bidirectional=True),
        "lstm with weight norm": lambda: nn.utils.weight_norm(nn.LSTM(3, 2), "weight_hh_l0"),
        "softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 6, [2, 4]),
        "parameters": lambda: nn.ModuleDict(
            {"p": nn.ParameterList([torch.rand(2), torch.rand(3)]), "d": nn.ParameterDict({"x": torch.rand(1)})}
        ),
        "pruned": lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)),
    }[kind]()


NORMS = (
    "old weight norm", "weight norm", "old spectral norm", "spectral norm", "orthogonal", "instance norm",
    "sync batch norm", "attention", "transformer", "lstm", "lstm with weight norm", "softmax", "parameters", "pruned",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "plain"])
def test_torchs_special_modules_round_trip(tmp_path, kind, suffix):
    """Norms, parametrisations and recurrent layers: what we saved, and what torch saved, loads bit for bit."""
    source = nested_norms(kind)
    for tensor in source.state_dict().values():
        tensor.copy_(torch.rand_like(tensor.float()) + 0.1)
    want = weights(source)
    path = tmp_path / f"a{'.pth' if suffix == 'plain' else suffix}"
    torch.save(source.state_dict(), path) if suffix == "plain" else anycard.save(source, path)
    for target in (lambda: nested_norms(kind), nested_norms(kind)):
        assert_same(weights(anycard.load(path, target)), want)
    if suffix == ".pth":
        theirs = torch.load(path, weights_only=True)
        assert theirs._metadata == source.state_dict()._metadata
        nested_norms(kind).load_state_dict(theirs)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("inner", [False, True])
def test_old_weight_norm_names_load_into_the_new_one_anywhere(tmp_path, inner):
    """weight_g and weight_v of a linear layer in a DataParallel file become parametrizations."""

    def new() -> nn.Module:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=1)
        return nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), layer)}) if inner else nn.Sequential(layer)

    old = nn.utils.weight_norm(nn.Linear(3, 2), dim=1)
    filled(old)
    holder = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), old)}) if inner else nn.Sequential(old)
    torch.save({"model": {f"module.{k}": v for k, v in holder.state_dict().items()}}, tmp_path / "a.pth")
    theirs = new()
    theirs.load_state_dict(holder.state_dict())
    for target in (new, new()):
        assert_same(weights(anycard.load(tmp_path / "a.pth", target)), weights(theirs))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (("generator",), "module."),
        pytest.param(("state_dict",), "model.net."),
        pytest.param(("generator", "discriminator"), "module."),
    ],
)
def test_a_vocoders_old_names_below_a_key(tmp_path, keys, prefix):
    """Nothing but old weight norm names, below a key and a prefix, beside another network: found by what fits."""

    def build() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False)))

    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2, bias=False)))
    tree: dict[str, Any] = {"steps": 4}
    for key in keys:
        net = old if key == keys[0] else nn.Sequential(nn.Conv1d(3, 4, 5))
        tree[key] = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save(tree, tmp_path / "a.pth")
    assert_same_bits(anycard.load(tmp_path / "a.pth", build)[0].parametrizations.weight.original1, old[0].weight_v)


def test_a_module_that_loads_itself_under_two_names(tmp_path):
    """One weight-normed module under two attributes is filled once, right, and stays one."""

    def build() -> nn.Module:
        model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))})
        model["b"] = model["a"]
        return model

    source = filled(build())
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    anycard.save(source, tmp_path / "ours.pth")
    for name in ("theirs.pth", "ours.pth"):
        for target in both(build):
            loaded = anycard.load(tmp_path / name, target)
            assert loaded["a"] is loaded["b"]
            assert_same(weights(loaded), weights(source))


@pytest.mark.parametrize(
    "build", [lambda: nn.LazyLinear(3), lambda: nn.Sequential(nn.LazyConv2d(4, 2), nn.LazyBatchNorm2d())]
)
def test_lazy_modules_take_their_shape_from_the_file(tmp_path, build):
    """A lazy layer that saw no input yet becomes as large as the file says."""
    source = build()
    source(torch.rand(2, 5) if isinstance(source, nn.Linear) else torch.rand(2, 3, 4, 4))
    filled(source)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    anycard.save(source, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        for target in (build, build()):
            assert_same(weights(anycard.load(tmp_path / name, target)), weights(source))


def test_a_plan_leaves_a_lazy_module_lazy(tmp_path):
    """plan, and a load that is refused, give no shape to a layer that has none yet."""
    torch.save({"0.weight": torch.rand(3, 5), "0.bias": torch.rand(3), "odd": torch.rand(1)}, tmp_path / "a.pth")
    model = nn.Sequential(nn.LazyLinear(3))
    anycard.plan(tmp_path / "a.pth", model)
    assert nn.parameter.is_lazy(model[0].weight)
    with pytest.raises(anycard.MismatchError, match="odd"):
        anycard.load(tmp_path / "a.pth", model)
    assert nn.parameter.is_lazy(model[0].weight)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d])
@pytest.mark.parametrize("legacy", [True, False])
def test_norms_from_before_the_counter(tmp_path, norm, legacy):
    """Old files lack num_batches_tracked: a new model's counter is 0, an existing one's stays, as in torch."""

    def build() -> nn.Module:
        return nn.Sequential(norm(3, track_running_stats=True, affine=True), nn.Linear(3, 1))

    state = {k: v for k, v in weights(filled(build())).items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=not legacy)
    theirs = filled(build(), 5)
    theirs.load_state_dict(torch.load(tmp_path / "old.pth"))
    assert_same(weights(anycard.load(tmp_path / "old.pth", filled(build(), 5))), weights(theirs))
    assert int(anycard.load(tmp_path / "old.pth", build)[0].num_batches_tracked) == 0


def test_a_counter_that_a_new_file_lacks_is_missing(tmp_path):
    """A state dict of version 2 that lacks the counter lost it: strict loading says so."""
    state = filled(nn.Sequential(nn.BatchNorm1d(3))).state_dict()
    del state["0.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.BatchNorm1d(3)), 5)
    refused(lambda: anycard.load(tmp_path / "a.pth", model), model, "num_batches_tracked")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tensor_whose_memory_was_freed_is_refused(tmp_path, suffix):
    """As FSDP frees parameters: there is nothing to save, and nothing is read from where it was."""
    for left in (0, 16):
        gone = torch.ones(10)
        gone.untyped_storage().resize_(left)
        with pytest.raises(anycard.CheckpointError, match="w has no memory"):
            anycard.save({"w": gone}, tmp_path / f"a{suffix}")
    with pytest.raises(anycard.CheckpointError, match="w has no memory"):
        anycard.save({"w": torch._efficientzerotensor(3)}, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


class _Computes(nn.Module):
    """Doubles what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, *rest)


class _WithMore(nn.DataParallel):
    """A wrapper that holds a module of its own beside the one that it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.extra = nn.Linear(2, 2)


def test_what_stands_beside_a_module_that_computes_is_loaded_too(tmp_path):
    """The wrapped module's canonical name is that of the whole: what a wrapper holds besides is not its own."""
    source = filled(_WithMore(_Computes()))
    anycard.save(source, tmp_path / "a.pth")
    model = filled(_WithMore(_Computes()), 5)
    anycard.load(tmp_path / "a.pth", model)
    assert_same_bits(model.extra.weight, source.extra.weight)
    assert_same_bits(model.module.weight, source.module.weight * 2)


def test_a_sparse_buffer_is_planned_and_refused_by_name(tmp_path):
    """torch gives no `nbytes` for it; and nothing else is filled before it is met."""
    model = filled(nn.Linear(2, 2), 5)
    before = weights(model)
    torch.save({**filled(nn.Linear(2, 2)).state_dict(), "mask": torch.eye(3)}, tmp_path / "a.pth")
    model.register_buffer("mask", torch.eye(3).to_sparse())
    plan = anycard.plan(tmp_path / "a.pth", model)
    assert (plan.total, plan.fits, plan.layouts) == (3, False, {"mask": "sparse_coo"})
    assert "1 not dense in the model" in str(plan)
    with pytest.raises(anycard.MismatchError, match="mask: sparse_coo in the model"):
        anycard.load(tmp_path / "a.pth", model)
    assert_same({name: model.state_dict()[name] for name in before}, before)
    with pytest.warns(UserWarning, match="mask"):
        anycard.load(tmp_path / "a.pth", model, strict=False)
    assert_same_bits(model.bias, filled(nn.Linear(2, 2)).bias)
    anycard.load(tmp_path / "a.pth", model, only=["weight", "bias"])
    assert_same_bits(model.weight, filled(nn.Linear(2, 2)).weight)


class _Scripted(nn.Module):
    """Holds a scripted module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        self.fc = nn.Linear(2, 1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
@pytest.mark.parametrize("build", [_Scripted, lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)))])
def test_scripted_modules_are_saved_and_loaded(tmp_path, build, wrap, suffix):
    """A ScriptModule, whole or within a model, gives its weights and takes them; a plain one takes them too."""
    source = filled(build())
    anycard.save(wrap(source), tmp_path / f"a{suffix}")
    assert_same(anycard.read(tmp_path / f"a{suffix}"), weights(source))
    assert_same(weights(anycard.load(tmp_path / f"a{suffix}", build())), weights(source))
