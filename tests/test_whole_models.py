"""Whole models in a file: of classes that are absent, with odd attributes, and what cannot be pickled."""

from __future__ import annotations

import collections
import functools
import os
import subprocess
import sys
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from helpers import Small, assert_same, assert_same_bits, both, everything, filled, quiet, told, unchanged, weights

SCRIPT = """
import sys, torch
from torch import nn
class Trained(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        self.note = "made in a script"
if __name__ == "__main__":
    torch.manual_seed(3)
    model = Trained()
    torch.save(model, sys.argv[1])
    torch.save(nn.DataParallel(model), sys.argv[2], _use_new_zipfile_serialization=False)
    torch.save(model.state_dict, sys.argv[3])
    import anycard
    anycard.save(model, sys.argv[4], whole=True)
    torch.save(model.state_dict(), sys.argv[5])
"""


def test_a_class_of_another_script(tmp_path):
    """Whole models of a training script's __main__: weights load without the class, rebuilding asks for it."""
    (tmp_path / "train.py").write_text(SCRIPT)
    names = ["a.pth", "b.pkl", "c.pt", "d.pt", "weights.pth"]
    paths = [tmp_path / name for name in names]
    subprocess.run([sys.executable, str(tmp_path / "train.py"), *map(str, paths)], check=True)
    want = torch.load(paths[-1], weights_only=True)

    def build() -> nn.Module:
        return nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))})

    for path in paths[:-1]:
        assert_same(anycard.read(path), want)
        for target in both(build):
            assert_same(weights(anycard.load(path, target)), want)
        with pytest.raises(anycard.UntrustedError, match=r"__main__\.Trained"):
            anycard.load(path)
        with pytest.raises(anycard.CheckpointError, match="__main__ has no Trained"):
            anycard.load(path, allow=["__main__"])
    main = sys.modules["__main__"]
    namespace: dict[str, Any] = {"__name__": "__main__x"}
    exec(SCRIPT, namespace)
    kind = namespace["Trained"]
    kind.__module__ = "__main__"
    main.Trained = kind
    try:
        rebuilt = anycard.load(paths[0], allow=["__main__.Trained"])
    finally:
        del main.Trained
    assert type(rebuilt) is kind and rebuilt.note == "made in a script"
    assert_same(weights(rebuilt), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_model_object_of_another_dtype_within_a_dict(tmp_path, dtype, legacy):
    """{"ema": None, "model": <module>, ...} of an absent package: its weights load, cast to the model's dtype."""
    package = types.ModuleType("absent_pkg")
    kind = type("Detector", (Small,), {"__module__": "absent_pkg"})
    package.Detector = kind
    sys.modules["absent_pkg"] = package
    try:
        source = filled(kind()).to(dtype)
        source.stride = torch.tensor([8.0, 16.0])
        tree = {"epoch": 4, "ema": None, "model": source, "updates": 0, "opt": {"lr": 0.1}}
        with quiet():  # the legacy writer wants the class's source code
            torch.save(tree, tmp_path / "best.pt", _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["absent_pkg"]
    want = {k: v.float() if v.is_floating_point() else v for k, v in weights(source).items()}
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "best.pt", target)), want)
    assert_same(weights(anycard.load(tmp_path / "best.pt", Small, dtype="auto")), weights(source))
    assert_same(anycard.read(tmp_path / "best.pt"), weights(source))
    assert "absent_pkg" not in sys.modules
    with pytest.raises(anycard.UntrustedError, match=r"absent_pkg\.Detector"):
        anycard.load(tmp_path / "best.pt")


def add_one(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


class Odd(nn.Module):
    """Keeps things that people keep on models."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.same = self.fc
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.slice = torch.rand(4)[1:3]
        self.activation = nn.functional.relu
        self.add = functools.partial(torch.add, 1)
        self.dtype, self.shape, self.device = torch.bfloat16, torch.Size([1, 2]), torch.device("cpu")
        self.names = {"b", "a"}
        self.counts = collections.defaultdict(int, {1: 2})
        self.order = OrderedDict(a=1)
        self.array, self.score = np.arange(3), np.float32(2)
        self.fc.register_forward_hook(add_one)
        self.fc.requires_grad_(False)


@pytest.mark.parametrize("plain", [True, False])
def test_a_whole_model_with_odd_attributes(tmp_path, plain):
    """Shared modules, hooks, arrays, sets, partials, sizes: rebuilt with exactly the classes that the error names."""
    model = filled(Odd())
    torch.save(model, tmp_path / "a.pt") if plain else anycard.save(model, tmp_path / "a.pt", whole=True)
    assert_same(anycard.read(tmp_path / "a.pt"), weights(model))
    with pytest.raises(anycard.UntrustedError) as caught:
        anycard.load(tmp_path / "a.pt")
    for rebuilt in (
        torch.load(tmp_path / "a.pt", weights_only=False),
        anycard.load(tmp_path / "a.pt", allow=list(caught.value.needed)),
    ):
        assert_same(everything(rebuilt), everything(model))
        assert rebuilt.fc is rebuilt.same
        assert not rebuilt.fc.weight.requires_grad
        assert_same_bits(rebuilt.slice, model.slice)
        x = torch.rand(1, 2)
        assert_same_bits(rebuilt.fc(x), model.fc(x))
        assert rebuilt.add(2) == 3 and rebuilt.activation is nn.functional.relu
        assert (rebuilt.dtype, rebuilt.shape, rebuilt.device) == (model.dtype, model.shape, model.device)
        assert rebuilt.names == {"a", "b"} and rebuilt.counts[1] == 2
        assert (rebuilt.array == model.array).all() and rebuilt.score == 2 and rebuilt.order == model.order


@pytest.mark.parametrize("value", [torch.Size([2, 3]), collections.defaultdict(list), collections.Counter("aab")])
def test_containers_on_a_whole_model_keep_their_class(tmp_path, value):
    """A torch.Size, a defaultdict or a Counter that a whole model keeps is one again after anycard.load."""
    model = nn.Linear(2, 2)
    model.kept = value
    anycard.save(model, tmp_path / "a.pt", whole=True)
    assert type(torch.load(tmp_path / "a.pt", weights_only=False).kept) is type(value)
    try:
        kept = anycard.load(tmp_path / "a.pt").kept
    except anycard.UntrustedError as error:
        kept = anycard.load(tmp_path / "a.pt", allow=list(error.needed)).kept
    assert type(kept) is type(value) and kept == value


class WithLambda(nn.Module):
    """Keeps what cannot be pickled, some levels down."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.blocks[0].act = lambda x: x


def test_what_cannot_be_pickled_is_named_by_its_path(tmp_path):
    """A lambda on a submodule: the error says where, and the old file stays."""
    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(anycard.CheckpointError, match=r"blocks\.0\.act"):
        anycard.save(WithLambda(), tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_parametrised_model_as_a_whole(tmp_path):
    """torch cannot pickle a parametrised module: a CheckpointError names it, and its weights can be saved."""
    model = nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(anycard.CheckpointError, match="1"):
        anycard.save(model, tmp_path / "a.pt", whole=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_whole_model_with_old_norms(tmp_path):
    """The old weight and spectral norm keep hook objects: the file works in torch, here, and for weights."""

    def build() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)), nn.utils.spectral_norm(nn.Linear(2, 2))).eval()

    model = build()
    anycard.save(model, tmp_path / "a.pt", whole=True)
    x = torch.ones(1, 2)
    assert_same_bits(torch.load(tmp_path / "a.pt", weights_only=False)(x), model(x))
    assert_same_bits(anycard.load(tmp_path / "a.pt")(x), model(x))
    assert_same(weights(anycard.load(tmp_path / "a.pt", build)), weights(model))


def test_a_whole_model_tells_how_far_it_is(tmp_path):
    """`progress=` counts up to all of its bytes, a tied tensor's once."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    anycard.save(model, tmp_path / "a.pt", whole=True)
    seen: list[tuple[int, int]] = []
    anycard.load(tmp_path / "a.pt", progress=lambda done, total: seen.append((done, total)))
    nbytes = 4 * (16 + 4 * 4) + 8
    assert seen[-1] == (nbytes, nbytes)
    assert [total for _, total in seen] == [nbytes] * len(seen)


def test_a_whole_model_of_torchs_own_layers_needs_no_trust(tmp_path):
    """Recurrent, attention and embedding layers rebuild without allow= and compute the same."""
    layers = {"gru": nn.GRU(2, 3), "enc": nn.TransformerEncoderLayer(4, 2, 4), "bag": nn.EmbeddingBag(3, 2)}
    model = filled(nn.ModuleDict(layers)).eval()
    anycard.save(model, tmp_path / "a.pt", whole=True)
    rebuilt = anycard.load(tmp_path / "a.pt")
    x, y = torch.rand(2, 1, 2), torch.rand(2, 1, 4)
    assert_same(weights(rebuilt), weights(model))
    assert_same_bits(rebuilt["gru"](x)[0], model["gru"](x)[0])
    assert_same_bits(rebuilt["enc"](y), model["enc"](y))


class Actor(nn.Module):
    """Learns a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_alpha = torch.full((1,), 0.5, requires_grad=True)
        self.fixed = torch.ones(2)


@pytest.mark.parametrize("plain", [True, False])
def test_a_tensor_attribute_that_is_learned(tmp_path, plain):
    """It asks for gradients after the load, as before, by anycard and by plain PyTorch."""
    torch.save(Actor(), tmp_path / "a.pt") if plain else anycard.save(Actor(), tmp_path / "a.pt", whole=True)
    for model in (
        anycard.load(tmp_path / "a.pt", allow=f"{__name__}.Actor"),
        torch.load(tmp_path / "a.pt", weights_only=False),
    ):
        assert model.log_alpha.requires_grad and not model.fixed.requires_grad
        assert_same_bits(model.log_alpha.detach(), torch.full((1,), 0.5))


def test_what_tensors_carry_beside_their_values_is_said(tmp_path):
    """An attribute of a parameter and a class of its own are not written; a warning names them."""

    class Marked(torch.Tensor):
        pass

    model = filled(nn.Linear(2, 2))
    model.mean = nn.Buffer(torch.ones(2))
    with quiet():
        anycard.save(model, tmp_path / "a.pt", whole=True)
    model.weight._no_weight_decay = True
    model.scale = torch.ones(2).as_subclass(Marked)
    told(lambda: anycard.save(model, tmp_path / "a.pt", whole=True), "_no_weight_decay", "the class Marked")
    assert_same(weights(anycard.load(tmp_path / "a.pt")), weights(model))


def test_wrong_arguments_are_told_at_once(tmp_path):
    """Classes for allow=, a rename that forgets what stays, a path that is none: TypeError, with what is expected."""
    model = filled(nn.Linear(2, 2))
    anycard.save(model, tmp_path / "a.pt", whole=True)
    with pytest.raises(TypeError, match=r"allow takes names such as .*Actor'"):
        anycard.load(tmp_path / "a.pt", allow=[Actor])
    for rename in (lambda name: None, {"weight": None}):
        with unchanged(model), pytest.raises(TypeError, match="rename"):
            anycard.load(tmp_path / "a.pt", model, rename=rename)
    with unchanged(model), pytest.raises(TypeError, match="only"):
        anycard.load(tmp_path / "a.pt", model, only=[0])
    for path in (b"x.pt", None, 3):
        with pytest.raises(TypeError, match="path"):
            anycard.save(model, path)
        with pytest.raises(TypeError, match="path"):
            anycard.load(path, model)


SETS = """
import dataclasses, enum, hashlib, io, pathlib, sys
import torch, anycard
from torch import nn
Mode = enum.Enum("Mode", "A B C D E F", module="__main__")
class Name(str): pass
class Names(set): pass
class FrozenNames(frozenset): pass
class Plain:
    def __init__(self, value): self.value = value
@dataclasses.dataclass(frozen=True)
class Key:
    name: str
    modes: frozenset
class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        object.__setattr__(self, "parent", parent)
waste = [object() for _ in range(int(sys.argv[1]))]
model = nn.Module()
model.children_ = nn.ModuleList([Child(model) for _ in range(6)])
model.sets = [
    set(Mode), {torch.float16, torch.float32, torch.float64, torch.int8, torch.bool, torch.uint8}, {None, 1, 2.0, "x"},
    {pathlib.PurePosixPath(x) for x in "abcdef"}, {(x, Mode[x]) for x in "ABCDEF"}, {Name(x) for x in "abcdef"},
    {(Name(x),) for x in "abcdef"}, {Key(x, frozenset(Mode)) for x in "abcdef"},
    {torch.device("cpu", i) for i in range(6)},
    Names("abcdef"), FrozenNames("abcdef"), {Plain(x) for x in range(9)},
    frozenset(frozenset(x) for x in ("ab", "cd", "ef", "gh")), {print, len, int, str, nn.Linear, torch.relu},
    set(model.children_), {(c, "x") for c in model.children_}, set(model.parameters()),
]
out = io.BytesIO()
anycard.save(model, out, whole=True)
print(hashlib.sha256(out.getvalue()).hexdigest())
"""


def test_sets_of_any_values_give_the_same_bytes(tmp_path):
    """Whatever the hash seed and the addresses; a set that its own elements reach is written too."""
    (tmp_path / "sets.py").write_text(SETS)
    told = {
        subprocess.run(
            [sys.executable, str(tmp_path / "sets.py"), str(seed * 1000)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True, capture_output=True,
        ).stdout
        for seed in (1, 2, 3)
    }  # fmt: skip
    assert len(told) == 1


class Refusing:
    """Its own way of being pickled raises what no pickler does."""

    def __reduce__(self) -> Any:
        raise ValueError("not me")


class WithState(nn.Module):
    """Refuses to give its state."""

    def __getstate__(self) -> Any:
        raise KeyError("secret")


@pytest.mark.filterwarnings("ignore:.*sparse:UserWarning")
@pytest.mark.parametrize(
    ("where", "spoil"),
    [
        ("enc.1.mask", lambda enc: enc[1].register_buffer("mask", torch.empty(2, device="meta"), persistent=False)),
        ("enc.1.mask", lambda enc: enc[1].register_buffer("mask", torch.eye(2).to_sparse())),
        ("enc.0.weight", lambda enc: enc[0].to("meta")),
        ("enc.2.weight", lambda enc: enc.append(nn.LazyLinear(2))),
        ("enc.0.seen", lambda enc: setattr(enc[0], "seen", [{"z": torch.eye(2).to_sparse()}])),
        ("enc.0.own", lambda enc: setattr(enc[0], "own", {"x": [Refusing()]})),
        ("enc.2", lambda enc: enc.append(WithState())),
    ],
)
def test_whatever_cannot_be_written_is_named_by_its_path(tmp_path, where, spoil):
    """Parameters and buffers, what lies within attributes, and objects that raise errors of their own."""
    model = nn.ModuleDict({"enc": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})
    spoil(model["enc"])
    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(anycard.CheckpointError) as caught:
        anycard.save(nn.DataParallel(model), tmp_path / "a.pt", whole=True)
    assert caught.value.name == where and str(caught.value).count(where) == 1
    assert (tmp_path / "a.pt").read_bytes() == b"old"
