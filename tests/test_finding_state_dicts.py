"""Where in a file the weights are: below keys, in nested dicts, beside another state dict that fits as well."""

from __future__ import annotations

import argparse
import enum
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import anycard
from helpers import Small, assert_same, assert_same_bits, both, filled, quiet, told, unchanged, weights


def two_nets(keys: tuple[str, str]) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    one, two = filled(Small(), 1), filled(Small(), 2)
    return {keys[0]: one.state_dict(), keys[1]: two.state_dict()}, one, two


@pytest.mark.parametrize(
    "keys",
    [("online", "target"), ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("netG_A", "netG_B"), ("q", "k")],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_two_state_dicts_that_fit_are_listed_and_key_picks(tmp_path, keys, legacy):
    """Two networks of one shape in a file: the error names both, key= picks, nothing changes before."""
    tree, *nets = two_nets(keys)
    tree |= {"epoch": 3, "optimizer": torch.optim.SGD(nets[0].parameters(), 0.1).state_dict()}
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError) as caught:
        anycard.load(tmp_path / "a.pth", model)
    assert all(repr(key) in str(caught.value) for key in keys)
    for key, net in zip(keys, nets, strict=True):
        assert_same(weights(anycard.load(tmp_path / "a.pth", model, key=key)), weights(net))
        assert_same(anycard.read(tmp_path / "a.pth", key=key), weights(net))
    with pytest.raises(ValueError, match=keys[0]):
        anycard.read(tmp_path / "a.pth", key="nothing")


def test_two_model_objects_in_one_file(tmp_path):
    """model and ema both as objects: both are named, key= picks."""
    one, two = filled(Small(), 1), filled(Small(), 2)
    torch.save({"model": one, "ema": two}, tmp_path / "a.pt")
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError, match=r"'model'.*'ema'"):
        anycard.load(tmp_path / "a.pt", model)
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small, key="ema")), weights(two))


def test_a_momentum_pair_below_one_wrapper(tmp_path):
    """MoCo's names: query and key encoder in one DataParallel state dict, beside a queue; key= or rename picks."""
    query, key = filled(Small(), 1), filled(Small(), 2)
    state = {f"module.encoder_q.{k}": v for k, v in weights(query).items()}
    state |= {f"module.encoder_k.{k}": v for k, v in weights(key).items()}
    state |= {"module.queue": torch.rand(4, 3), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 3, "arch": "small", "state_dict": state}, tmp_path / "moco.pth.tar")
    model = filled(Small(), 5)
    with unchanged(model), pytest.raises(anycard.CheckpointError, match=r"encoder_q.*encoder_k"):
        anycard.load(tmp_path / "moco.pth.tar", model)
    rename = [(r"^(module\.)?encoder_q\.", "")]
    with quiet():
        assert_same(
            weights(anycard.load(tmp_path / "moco.pth.tar", model, rename=rename, strict=False)), weights(query)
        )
    with quiet():
        loaded = anycard.load(tmp_path / "moco.pth.tar", Small, key="module.encoder_k", strict=False)
    assert_same(weights(loaded), weights(key))


def test_a_part_of_a_larger_model(tmp_path):
    """The file of a model with two encoders, for one encoder: both places are named, key= picks one."""
    large = filled(nn.ModuleDict({"enc": nn.Sequential(nn.Linear(2, 2)), "dec": nn.Sequential(nn.Linear(2, 2))}))
    anycard.save(large, tmp_path / "a.pth")
    part = filled(nn.Sequential(nn.Linear(2, 2)), 5)
    with unchanged(part), pytest.raises(anycard.CheckpointError, match=r"enc.*dec"):
        anycard.load(tmp_path / "a.pth", part)
    anycard.load(tmp_path / "a.pth", part, key="dec")
    assert_same(weights(part), weights(large["dec"]))


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "_forward_module.net.", "encoder.backbone."])
def test_a_prefix_that_the_model_lacks_is_found(tmp_path, prefix):
    """Lightning's `model.` and its like: the model's names begin below it."""
    source = filled(Small())
    torch.save({"state_dict": {prefix + k: v for k, v in weights(source).items()}, "epoch": 1}, tmp_path / "a.ckpt")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.ckpt", target)), weights(source))


@pytest.mark.parametrize(
    "place",
    [
        lambda nested: nested,
        lambda nested: {"model": nested, "iteration": 5, "args": argparse.Namespace(a=1)},
        lambda nested: {"state_dict": {"net": nested}},
    ],
    ids=["top", "key", "two keys"],
)
def test_a_state_dict_in_nested_dicts(tmp_path, place):
    """Names split over dicts of dicts at odd places join by dots, at the top and below a key."""
    source = filled(Small())
    state = weights(source)
    nested = {
        "stem": {"weight": state["stem.weight"], "bias": state["stem.bias"]},
        "norm": OrderedDict((k[5:], v) for k, v in state.items() if k.startswith("norm.")),
        "head": {"weight": state["head.weight"], "bias": state["head.bias"]},
    }
    torch.save(place(nested), tmp_path / "a.pt")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.pt", target)), state)


def test_two_places_with_one_path_are_not_mixed_up(tmp_path):
    """`{"a": {"b": x}, "a.b": y}`: two tensors of one full path are both kept, or the file is refused."""
    torch.save({"a": {"b": torch.zeros(2)}, "a.b": torch.ones(2)}, tmp_path / "a.pt")
    told(lambda: anycard.read(tmp_path / "a.pt"), "a.b")


@pytest.mark.parametrize(
    "place",
    [
        lambda model: (model.state_dict(), 5),
        lambda model: [model.state_dict(), torch.optim.Adam(model.parameters()).state_dict(), 3],
        lambda model: (model, torch.optim.Adam(model.parameters()).state_dict()),
        lambda model: {"epoch": 1, "model": None, "ema": model, "updates": 3},
    ],
    ids=["tuple", "list", "module in a tuple", "module under ema"],
)
def test_state_dicts_at_odd_places(tmp_path, place):
    """In a tuple, a list, beside nothing under the usual key: the one state dict is found, and read."""
    source = filled(Small())
    torch.save(place(source), tmp_path / "a.pt")
    for target in both(Small):
        assert_same(weights(anycard.load(tmp_path / "a.pt", target)), weights(source))
    assert_same(anycard.read(tmp_path / "a.pt"), weights(source))


@pytest.mark.parametrize(
    "place",
    [
        lambda s, o: (s, o),
        lambda s, o: {"model": s, "opts": [o, o], "best": {"loss": torch.tensor(0.3)}},
        lambda s, o: {"state_dict": s, "metrics": {"x": torch.ones(2)}, "random_state": {"t": torch.ones(2)}},
        lambda s, o: {"state_dict": s, "message_hub": {"runtime_info": {"x": torch.ones(2)}}},
    ],
)
def test_what_a_trainer_keeps_is_no_model(tmp_path, place):
    """Optimizers in lists, metrics, random states beside the weights: one state dict to read."""
    source = filled(Small())
    opt = torch.optim.Rprop(source.parameters())
    source.head.weight.grad = torch.ones_like(source.head.weight)
    opt.step()
    torch.save(place(weights(source), opt.state_dict()), tmp_path / "a.pt")
    assert_same(anycard.read(tmp_path / "a.pt"), weights(source))
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small)), weights(source))


@pytest.mark.parametrize("beside", ["sampler", "scale"])
def test_a_part_by_the_name_of_what_a_trainer_keeps(tmp_path, beside):
    """It is the model's where no whole model lies beside it, and where the model has it."""

    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": nn.Linear(2, 2), beside: nn.ParameterDict({"s": torch.tensor(0.0)})})

    model = filled(build())
    torch.save({name: part.state_dict() for name, part in model.items()}, tmp_path / "a.pt")
    assert_same(weights(anycard.load(tmp_path / "a.pt", build)), weights(model))
    with pytest.raises(anycard.CheckpointError, match=beside):
        anycard.read(tmp_path / "a.pt")


@pytest.mark.parametrize("tree", [{"module": ...}, {"module": ..., "optimizer": None, "global_steps": 3}])
def test_deepspeeds_key_is_not_a_wrapper(tmp_path, tree):
    """{"module": state dict, ...}: the outer key goes, the names are the model's."""
    source = filled(Small())
    torch.save(tree | {"module": source.state_dict()}, tmp_path / "a.pt")
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small)), weights(source))
    assert_same(anycard.read(tmp_path / "a.pt"), weights(source))


def test_the_reference_scripts_of_torchvision(tmp_path):
    """model and model_ema in one file: both fit, so both are named; key= gives either, with its counter."""
    source, ema = filled(Small()), AveragedModel(filled(Small(), 1))
    ema.n_averaged.fill_(9)
    tree = {"model": source.state_dict(), "model_ema": ema.state_dict(), "epoch": 1, "args": argparse.Namespace(a=1)}
    torch.save(tree, tmp_path / "a.pth")
    for target in (Small, nn.DataParallel(Small())):
        with pytest.raises(anycard.CheckpointError, match="model_ema"):
            anycard.load(tmp_path / "a.pth", target)
    assert_same(weights(anycard.load(tmp_path / "a.pth", Small, key="model_ema")), weights(ema.module))
    assert int(anycard.load(tmp_path / "a.pth", AveragedModel(Small()), key="model_ema").n_averaged) == 9


def test_averages_of_another_library(tmp_path):
    """timm's ModelEmaV2 keeps the model under `module`: its file fits the bare model, and the other way round."""
    from timm.utils import ModelEmaV2

    source = filled(Small())
    ema = ModelEmaV2(source)
    anycard.save(ema, tmp_path / "ours.pth")
    torch.save({"state_dict_ema": ema.state_dict()}, tmp_path / "theirs.pth")
    anycard.save(source, tmp_path / "bare.pth")
    for name in ("ours.pth", "theirs.pth", "bare.pth"):
        assert_same(weights(anycard.load(tmp_path / name, Small)), weights(source))
        assert_same(weights(anycard.load(tmp_path / name, ModelEmaV2(filled(Small(), 5))).module), weights(source))


class Parts(nn.Module):
    """A model of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = nn.Linear(2, 2), nn.Linear(2, 3)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_hint_for_a_part_works(tmp_path, wrap, whole):
    """A part is asked for by its canonical name, whatever wrapped the model; names beside it are canonical too."""
    source = filled(Parts())
    if whole:
        anycard.save(wrap(source), tmp_path / "a.pth", whole=True)
    else:
        torch.save(wrap(source).state_dict(), tmp_path / "a.pth")
    model = filled(nn.Linear(2, 2), 5)
    with unchanged(model), pytest.raises(anycard.MismatchError, match="key='backbone'"):
        anycard.load(tmp_path / "a.pth", model)
    assert set(anycard.plan(tmp_path / "a.pth", model).unexpected) == {"fc.weight", "fc.bias"}
    anycard.load(tmp_path / "a.pth", model, key="backbone")
    assert_same(weights(model), weights(source.backbone))


def test_the_one_state_dict_that_fits_is_found(tmp_path):
    """Both have the model's names, one of them has more: the other is meant. Where no shape fits, the plan says so."""
    g, d = filled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), filled(nn.Sequential(nn.Linear(2, 2)), 1)
    torch.save({"generator": g.state_dict(), "discriminator": d.state_dict()}, tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.Linear(2, 2)), 5)
    anycard.load(tmp_path / "a.pth", model)
    assert_same(weights(model), weights(d))
    torch.save({"a": nn.Linear(3, 3).state_dict(), "b": nn.Linear(3, 3).state_dict()}, tmp_path / "b.pth")
    with pytest.raises(anycard.MismatchError, match="3 x 3 in the file, 2 x 2 in the model"):
        anycard.load(tmp_path / "b.pth", nn.Linear(2, 2))


def test_a_rename_gets_canonical_names(tmp_path):
    """Whatever wrapped the model, the function sees its own names only."""
    source = filled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    torch.save(nn.DataParallel(source).state_dict(), tmp_path / "a.pth")
    model = filled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 5)
    anycard.load(tmp_path / "a.pth", model, rename=lambda name: {"0": "1", "1": "0"}[name[0]] + name[1:])
    assert_same_bits(model[0].weight, source[1].weight)
    assert_same_bits(model[1].bias, source[0].bias)


class Part(enum.Enum):
    """Keys of someone's own."""

    ENCODER = "encoder"
    DECODER = 2


class Name(str):
    """Text of a class of one's own."""


class Own(OrderedDict):  # type: ignore[type-arg]
    """A dict of a class of one's own."""


class Easy(dict):  # type: ignore[type-arg]
    """A dict whose entries are attributes as well."""

    def __init__(self, held: dict[str, Any]) -> None:
        super().__init__(held)
        self.__dict__.update(held)


class Thing:
    """A key that is told by identity."""


Pair = namedtuple("Pair", "a b")


def held_by(value: Any) -> list[torch.Tensor]:
    value = value.state if isinstance(value, torch.optim.Optimizer) else value
    return [tensor for held in value.values() for tensor in held_by(held)] if isinstance(value, dict) else [value]


def stepped() -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


ODD = {
    "an optimizer": stepped,
    "an Enum": lambda: {Part.ENCODER: torch.ones(1), Part.DECODER: torch.zeros(1)},
    "devices": lambda: {torch.device("cuda", 0): torch.ones(1), torch.device("cuda", 1): torch.zeros(1)},
    "tuples": lambda: {Pair(1, 2): torch.ones(1), Pair(1, 3): torch.zeros(1), (1, "x"): torch.ones(2)},
    "numpy's text": lambda: {np.str_("one"): torch.ones(1), np.str_("two"): torch.zeros(1)},
    "a number and its text": lambda: {1: torch.ones(1), "1": torch.zeros(1)},
    "objects": lambda: {object.__new__(Thing): torch.full((1,), float(i)) for i in range(3)},
    "dotted names": lambda: {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("protocol", [2, 4])
def test_odd_keys_beside_the_weights_do_not_block_them(tmp_path, kind, protocol):
    """Whatever keys a dict beside the state dict has, the model loads, and every tensor has a path of its own."""
    model = filled(Small(), 1)
    odd = ODD[kind]()
    torch.save({"model": model.state_dict(), "odd": odd, "epoch": 3}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small)), weights(model))
    assert_same(anycard.read(tmp_path / "a.pt", key="model"), weights(model))
    with anycard.open(tmp_path / "a.pt") as ckpt:
        beside = [ckpt.torch(name) for name in ckpt.tensors if name.startswith("odd.")]
    assert all(any(torch.equal(tensor, other) for other in beside) for tensor in held_by(odd))
    assert len(beside) >= len(held_by(odd))


@pytest.mark.parametrize("kind", [Name, np.str_])
def test_names_of_a_text_class(tmp_path, kind):
    """A state dict whose names are of a subclass of str reads and loads by their text."""
    model = filled(Small(), 1)
    torch.save({kind(name): value for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    assert_same(anycard.read(tmp_path / "a.pt"), weights(model))
    assert_same(weights(anycard.load(tmp_path / "a.pt", Small)), weights(model))


def test_two_weights_of_one_name_are_refused_when_they_are_asked_for(tmp_path):
    """`a.b` beside `a: {b}` in the state dict itself: its names do not tell which is meant; listing goes on."""
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "a.pt")
    with anycard.open(tmp_path / "a.pt") as ckpt:
        assert list(ckpt.tensors) == ["a.b", "a.b#2"]
    with pytest.raises(anycard.FormatError, match=r"one name, 'a\.b'"):
        anycard.read(tmp_path / "a.pt")


def test_two_values_of_one_path_are_both_listed(tmp_path):
    """Beside the weights too, names with dots meet dicts in dicts: the second has a number added."""
    tree = {"cfg": {"a.b": 1, "a": {"b": 2, "c": [3]}, "a.c.0": 4}, "w": torch.ones(1)}
    torch.save(tree, tmp_path / "a.pt")
    with anycard.open(tmp_path / "a.pt") as ckpt:
        assert ckpt.objects == {"cfg.a.b": 1, "cfg.a.b#2": 2, "cfg.a.c.0": 3, "cfg.a.c.0#2": 4}


def test_a_vocabulary_held_from_many_places(tmp_path):
    """What Lightning keeps of its arguments holds it again and again: the weights are read, and it is listed."""
    model = filled(Small(), 1)
    vocabulary = {f"word{number}": number for number in range(60_000)}
    tree = {"state_dict": model.state_dict(), "vocab": vocabulary, "hparams": {"vocab": vocabulary},
            "args": {"vocab": vocabulary}, "more": [{"vocab": vocabulary}] * 3}  # fmt: skip
    torch.save(tree, tmp_path / "a.ckpt")
    assert_same(anycard.read(tmp_path / "a.ckpt"), weights(model))
    assert_same(weights(anycard.load(tmp_path / "a.ckpt", Small)), weights(model))
    with anycard.open(tmp_path / "a.ckpt") as ckpt:
        assert ckpt.objects["vocab.word7"] == 7
        assert ckpt.objects["args.vocab"] == "<…>"  # as before


TREES = {
    "below a key": lambda make, state: {"state_dict": make(state), "epoch": 3},
    "at the top": lambda make, state: make({"state_dict": state, "epoch": 3}),
    "everywhere": lambda make, state: make({"state_dict": make(state), "epoch": 3}),
    "alone": lambda make, state: make(state),
    "two": lambda make, state: {"model": make(state), "ema": make(state)},
    "two at the top": lambda make, state: make({"model": state, "ema": make(state)}),
    "arrays": lambda make, state: {"model": make({n: t.numpy() for n, t in state.items()}), "epoch": 3},
    "beside an optimizer": lambda make, state: make(
        {"model": state, "optimizer": make({"state": {0: {"m": torch.ones(1)}}, "param_groups": [{"lr": 1}]})}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [Own, Easy])
@pytest.mark.parametrize("tree", TREES)
def test_dicts_of_ones_own_class(tmp_path, kind, tree):
    """They give what plain dicts give, wherever they stand."""
    model = filled(Small(), 1)
    state = OrderedDict(weights(model))
    for make, path in ((dict, tmp_path / "plain.pt"), (kind, tmp_path / "own.pt")):
        torch.save(TREES[tree](make, state), path)
    with anycard.open(tmp_path / "plain.pt") as plain, anycard.open(tmp_path / "own.pt") as own:
        assert [(held.key, list(held.tensors)) for held in own.state_dicts] == [
            (held.key, list(held.tensors)) for held in plain.state_dicts
        ]
        assert list(own.tensors) == list(plain.tensors)
    key = "ema" if "two" in tree else None
    assert_same(anycard.read(tmp_path / "own.pt", key=key), weights(model))
    assert_same(weights(anycard.load(tmp_path / "own.pt", Small, key=key)), weights(model))


def test_a_training_checkpoint_within_one_unfamiliar_key(tmp_path):
    """As PyTorch's tutorial of distributed checkpoints has it: what lies beside the weights shows what they are."""
    model = filled(nn.Linear(2, 2))
    state, optim = model.state_dict(), torch.optim.Adam(model.parameters()).state_dict()
    trees = (
        {"app": {"model": state, "optim": optim}},
        {"ckpt": {"model": state, "opt": optim, "args": {"lr": 0.5}}},
        {"agent": {"actor": state, "actor_optim": optim}},
    )
    for tree in trees:
        torch.save(tree, tmp_path / "a.pt")
        assert_same(anycard.read(tmp_path / "a.pt"), weights(model))
        assert anycard.plan(tmp_path / "a.pt", nn.Linear(2, 2)).fits
