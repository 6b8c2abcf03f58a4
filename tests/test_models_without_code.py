"""Whole models of packages that are gone, with what people keep on them: weights, tree and plain data come out."""

from __future__ import annotations

import copyreg
import io
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from torch import nn

import anycard
from anycard.cli.main import cli
from helpers import Reduced, assert_same, both, old_tensor, quiet, weights

PERSISTENCE = """
class EasyDict(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name)

def rebuild(meta):
    raise SystemExit("the file's code ran")

def persistent(cls):
    class Persistent(cls):
        def __reduce__(self):
            state = super().__reduce__()[2]
            meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": cls.__name__}
            return rebuild, (KIND(meta, state=state),), None
    return Persistent

KIND = dict
"""
NETWORK = """
import dataclasses, enum, functools, pickle, sys
import cloudpickle, numpy, torch
from torch import nn
from gone import persistence

class Colour(enum.Enum):
    RED = "r"

@dataclasses.dataclass
class Config:
    width: int = 3

def hook(module, args, output):
    return output

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer("noise", torch.ones(2))
        self.register_buffer("grid", torch.ones(4), persistent=False)
        self.gain = 0.5

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Layer()
        self.rest = nn.Sequential(Layer(), nn.Conv2d(2, 3, 3, padding=1))

class Kept(Network):
    def __init__(self):
        super().__init__()
        self.colour, self.config = Colour.RED, Config()
        self.rate, self.steps = numpy.float32(2.5), numpy.int64(7)
        self.norm = functools.partial(nn.LayerNorm, eps=1e-6)
        object.__setattr__(self.layer, "parent", self)
        self.layer.above, self.rest.by_name = [self], {"top": self}
        self.heads = [nn.Linear(2, 2)]
        self.layer.register_forward_hook(hook)
        self.register_forward_pre_hook(functools.partial(hook, None))
        self.run = self.rest.forward

class Closed(Network):
    def __init__(self):
        super().__init__()
        scale = torch.ones(1)
        self.act = lambda x: x * scale

class Persistent(Network):
    def __init__(self):
        super().__init__()
        self.z_dim, self.layer = 4, persistence.persistent(Layer)()
        self.rest[0] = persistence.persistent(Layer)()
"""
SAVE = """
import pickle, sys
import cloudpickle, torch
from gone import network, persistence
folder = sys.argv[1]
torch.save(network.Network().state_dict(), folder + "/weights.pt")
for new in (True, False):
    torch.save(network.Kept(), f"{folder}/kept-{new}.pt", _use_new_zipfile_serialization=new)
    torch.save(network.Closed(), f"{folder}/closed-{new}.pt", pickle_module=cloudpickle,
               _use_new_zipfile_serialization=new)
    for kind in (dict, persistence.EasyDict):
        persistence.KIND = kind
        model = persistence.persistent(network.Persistent)()
        torch.save(model, f"{folder}/persistent-{kind.__name__}-{new}.pt", _use_new_zipfile_serialization=new)
with open(folder + "/persistent.pkl", "wb") as file:
    pickle.dump({"G": model, "G_ema": model, "kwargs": persistence.EasyDict(path="x")}, file)
"""
FILES = [
    "kept-True", "kept-False", "closed-True", "closed-False", "persistent-dict-True", "persistent-dict-False",
    "persistent-EasyDict-True", "persistent-EasyDict-False",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a package that was there only while they were written."""
    files, package = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("code") / "gone"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "persistence.py").write_text(PERSISTENCE)
    (package / "network.py").write_text(NETWORK)
    command = [sys.executable, "-W", "ignore", "-c", SAVE, str(files)]
    subprocess.run(command, check=True, cwd=package.parent, timeout=60)
    return files


class Layer(nn.Module):
    """What a network of today looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("noise", torch.zeros(2))


def network() -> nn.Module:
    return nn.ModuleDict({"layer": Layer(), "rest": nn.Sequential(Layer(), nn.Conv2d(2, 3, 3))})


@pytest.mark.parametrize("name", FILES)
def test_weights(name: str, folder: Path) -> None:
    """Parameters and persistent buffers under canonical names, also into a fresh model; nothing is imported."""
    want = torch.load(folder / "weights.pt", weights_only=True)
    path = folder / f"{name}.pt"
    assert_same(anycard.read(path), want)
    for target in both(network):
        assert_same(weights(anycard.load(path, target)), want)
    with pytest.raises(anycard.UntrustedError, match="gone"):
        anycard.load(path)
    with anycard.open(path) as ckpt:
        assert "layer.grid" in ckpt.tensors
        assert set(ckpt.weights()) == set(want)
    assert not [module for module in sys.modules if module.startswith("gone")]


@pytest.mark.parametrize("name", FILES)
def test_tree(name: str, folder: Path) -> None:
    """The module tree with class names and what looks like constructor arguments."""
    run = click.testing.CliRunner().invoke(cli, ["show", "--tree", str(folder / f"{name}.pt")])
    assert run.exit_code == 0, run.output
    kind, _, _ = name.partition("-")
    head = {"kept": "Kept(rate=2.5, steps=7", "closed": "Closed(", "persistent": "Persistent(z_dim=4"}[kind]
    lines = run.output.splitlines()
    assert lines[:4] == [head, "  (layer): Layer(gain=0.5)", "  (rest): Sequential(", "    (0): Layer(gain=0.5)"]
    assert lines[4].startswith("    (1): Conv2d(in_channels=2, out_channels=3, kernel_size=(3, 3)")
    assert lines[5:] == ["  )", ")"]


@pytest.mark.parametrize("new", [True, False])
def test_objects_on_a_model(new: bool, folder: Path) -> None:
    """What a model of someone's own keeps is plain data with class names; links to modules stay links."""
    with anycard.open(folder / f"kept-{new}.pt") as ckpt:
        assert ckpt.objects["colour"] == {"__class__": "gone.network.Colour", "args": ["r"]}
        assert ckpt.objects["config"] == {"__class__": "gone.network.Config", "width": 3}
        assert (ckpt.objects["rate"], ckpt.objects["steps"], ckpt.objects["layer.gain"]) == (2.5, 7, 0.5)
        assert ckpt.objects["norm"]["__class__"] == "functools.partial"
        assert ckpt.objects["heads"] == [{"__class__": "torch.nn.modules.linear.Linear"}]
        assert ckpt.objects["layer.above"] == ["<…>"]
        assert not [name for name in ckpt.objects if name.startswith(("rest.1", "rest.training", "layer._"))]


def test_several_persistent_models_in_a_plain_pickle(folder: Path) -> None:
    """Each by its key, in a pickle whose tensors are torch files of their own."""
    want = torch.load(folder / "weights.pt", weights_only=True)
    path = folder / "persistent.pkl"
    with anycard.open(path) as ckpt:
        assert [found.key for found in ckpt.state_dicts] == ["G", "G_ema"]
        assert ckpt.objects["kwargs.path"] == "x"
    for key in ("G", "G_ema"):
        assert_same(anycard.read(path, key=key), want)
    assert_same(weights(anycard.load(path, network, key="G_ema")), want)


def test_a_traced_model() -> None:
    """torch.fx hands the module's dict to a function."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    file = io.BytesIO()
    torch.save({"model": nn.DataParallel(model), "epoch": 3}, file)
    file.seek(0)
    assert_same(anycard.read(file), weights(model))


def test_a_call_that_takes_no_state_is_no_module() -> None:
    """A dict that lacks what a module's has stays a part of the call."""
    held = {"_modules": {"a": 1}, "weight": torch.ones(2)}
    file = io.BytesIO()
    torch.save({"x": Reduced(print, (held,))}, file)
    file.seek(0)
    with anycard.open(file) as ckpt:
        assert list(ckpt.tensors) == ["x.0.weight"]
        assert ckpt.objects["x"]["__class__"] == "builtins.print"


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("new", [True, False])
def test_a_module_of_the_first_torches(new: bool) -> None:
    """Old parameters, a backend, no set of non-persistent buffers."""
    model = nn.BatchNorm1d(3)

    def parameter(name: str) -> Reduced:
        return Reduced(nn.Parameter, (old_tensor(getattr(model, name).data),), (True, False, OrderedDict()))

    state: dict[str, Any] = {
        "_backend": Reduced(OrderedDict, ()),
        "_parameters": OrderedDict(weight=parameter("weight"), bias=parameter("bias")),
        "_buffers": OrderedDict(running_mean=old_tensor(model.running_mean), running_var=old_tensor(model.running_var)),
        "_backward_hooks": OrderedDict(), "_forward_hooks": OrderedDict(), "_modules": OrderedDict(), "training": True,
        "num_features": 3, "affine": True, "eps": 1e-5, "momentum": 0.1,
    }  # fmt: skip
    file = io.BytesIO()
    with quiet():
        made = Reduced(copyreg._reconstructor, (nn.BatchNorm1d, object, None), state)
        torch.save(made, file, _use_new_zipfile_serialization=new)
    file.seek(0)
    want = weights(model)
    del want["num_batches_tracked"]
    assert_same(anycard.read(file), want)
    file.seek(0)
    loaded = weights(anycard.load(file, lambda: nn.BatchNorm1d(3)))
    assert_same({name: loaded[name] for name in want}, want)


class _Kept(nn.Linear):
    """Pickles itself as something of its own."""

    def __init__(self, how: str) -> None:
        super().__init__(2, 2)
        self.how = how

    def __getstate__(self) -> Any:
        return {"config": 1, "inner": {"sd": self.state_dict()}} if self.how == "dict" else (1, self.state_dict())

    def __reduce__(self) -> Any:
        return (_Kept, ("call", [self.state_dict()])) if self.how == "call" else super().__reduce__()


@pytest.mark.parametrize("how", ["dict", "tuple", "call"])
def test_a_layer_that_pickles_itself_its_own_way(how: str, tmp_path: Path) -> None:
    """Its tensors have the names of the state dict that it keeps."""
    model = nn.Sequential(nn.DataParallel(_Kept(how)), nn.Linear(2, 1))
    torch.save(model, tmp_path / "a.pt")
    assert_same(anycard.read(tmp_path / "a.pt"), weights(nn.Sequential(model[0].module, model[1])))
    other = nn.Sequential(_Kept(how), nn.Linear(2, 1))
    assert_same(weights(anycard.load(tmp_path / "a.pt", other)), weights(nn.Sequential(model[0].module, model[1])))
    done = anycard.convert(tmp_path / "a.pt", tmp_path / "a.pth")
    assert done.tensors == 4
    assert not any("weight" in name for name in done.left_behind)


def test_a_part_of_a_whole_model_is_rebuilt(tmp_path: Path) -> None:
    """The key of a module within it gives that module alone, under any wrapper; what is no module is refused."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    torch.save(nn.DataParallel(model), tmp_path / "a.pt")
    part = anycard.load(tmp_path / "a.pt", key="1")
    assert isinstance(part, nn.Sequential) and torch.equal(part[0].weight, model[1][0].weight)
    with pytest.raises(anycard.ChoiceError, match="nothing"):
        anycard.load(tmp_path / "a.pt", key="nothing")
