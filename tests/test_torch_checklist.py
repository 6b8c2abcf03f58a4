"""What PyTorch's own test suite covers of saving and loading, as tables: each kind is read as `torch.load` gives it.

Its list is the checklist (test/test_serialization.py and kin); what other files here test already is not repeated.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import pathlib
import pickle
import random
import types
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import anycard
from helpers import Reduced, assert_same, assert_same_bits, old_tensor, quiet

NEW = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def saved(value: Any, *, new: bool = True, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    with quiet():
        torch.save(value, file, _use_new_zipfile_serialization=new, **options)
    file.seek(0)
    return file


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Full paths of what containers hold, as anycard names them."""
    if isinstance(value, dict):
        for name, held in value.items():
            yield from leaves(held, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for index, held in enumerate(value):
            yield from leaves(held, f"{path}.{index}")
    else:
        yield path, value


Point = collections.namedtuple("Point", "x y")
BASE = torch.arange(24.0).reshape(4, 6)
COMPLEX = torch.randn(3, 2, dtype=torch.complex64)


def noted() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = {"tensor": torch.zeros(2)}
    return parameter


class Subclass(torch.Tensor):
    """A subclass of nothing but a name."""


class SubParameter(nn.Parameter):
    """The same of a parameter."""


def stepped(kind: Any, **options: Any) -> dict[str, Any]:
    """An optimizer's state after a step."""
    model = nn.Linear(2, 3)
    optimizer = kind(model.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer.state_dict()


def scheduled(kind: Any, *args: Any) -> dict[str, Any]:
    with quiet():
        return kind(torch.optim.SGD(nn.Linear(2, 3).parameters(), 0.1), *args).state_dict()


HALF = torch.arange(12, dtype=torch.uint8).view(torch.complex32).reshape(3, 1)
TENSORS: dict[str, Any] = {
    "channels last": torch.randn(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "overlapping": torch.as_strided(BASE, (3, 3), (1, 1)), "expanded": BASE[:1].expand(5, 6), "flipped": BASE.flip(0),
    "adjoint": COMPLEX.mH, "conj half": HALF.conj(), "as real": torch.view_as_real(COMPLEX),
    "imaginary part": COMPLEX.conj().imag, "no elements": torch.empty(2, 0, 3), "scalar": torch.tensor(3.0),
    "result": torch.ones(2, requires_grad=True) * 1, "parameter with attributes": noted(),
    "buffer": nn.Buffer(torch.ones(2)), "subclass": torch.ones(2).as_subclass(Subclass),
    "subclass parameter": nn.Parameter(torch.ones(2).as_subclass(Subclass)),
    "own parameter": SubParameter(torch.ones(2)),
    "int keys": {1: torch.ones(1), (1, 2): torch.zeros(1)}, "named tuple": Point(1, BASE),
    "views": [BASE, BASE[1], BASE.t(), BASE.reshape(-1)[3:9]], "random state": torch.get_rng_state(),
    **{str(dtype): torch.arange(8, dtype=torch.uint8).view(dtype) for dtype in (
        torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2, torch.float4_e2m1fn_x2, torch.uint64)},
    "adam": stepped(torch.optim.Adam, amsgrad=True), "sgd": stepped(torch.optim.SGD, momentum=0.9),
    "lbfgs": stepped(torch.optim.LBFGS), "rmsprop": stepped(torch.optim.RMSprop), "rprop": stepped(torch.optim.Rprop),
    "adagrad": stepped(torch.optim.Adagrad), "cosine": scheduled(lr_scheduler.CosineAnnealingLR, 3),
    "plateau": scheduled(lr_scheduler.ReduceLROnPlateau), "lambda": scheduled(lr_scheduler.LambdaLR, lambda epoch: 1.0),
    "steps": scheduled(lr_scheduler.MultiStepLR, [1, 2]), "cycle": scheduled(lr_scheduler.OneCycleLR, 1.0, 10),
    "scaler": torch.amp.GradScaler("cpu").state_dict(), "python's random": random.getstate(),
}  # fmt: skip


@NEW
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_torch_gives(kind: str, new: bool) -> None:
    """Every tensor bit for bit, every other leaf as plain data; and again after anycard has saved it."""
    value = {"x": TENSORS[kind], "beside": torch.arange(5.0)}
    want = dict(leaves(value))
    tensors = {name: held.detach() for name, held in want.items() if isinstance(held, torch.Tensor)}
    with anycard.open(saved(value, new=new)) as ckpt:
        assert_same({name: ckpt.torch(name) for name in ckpt.tensors}, tensors)
        objects = {name: held for name, held in ckpt.objects.items() if name in want}
        assert objects == {name: held for name, held in want.items() if name not in tensors and name in objects}
    again = io.BytesIO()
    anycard.save(value, again)
    again.seek(0)
    theirs = dict(leaves(torch.load(again, weights_only=True)))
    assert_same({name: theirs[name] for name in tensors}, tensors)
    assert {n: v for n, v in theirs.items() if n not in tensors} == {n: v for n, v in want.items() if n not in tensors}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@NEW
def test_tensors_and_parameters_of_the_first_torches(new: bool) -> None:
    """Classes called with a state, Variables, Parameters: tensors as ever; what was frozen stays frozen."""
    view = torch.randn(30).as_strided((2, 3), (9, 3), 2)
    state = (True, False, OrderedDict())
    made = old_tensor(view)
    given = {
        "tensor": made, "again": made, "plain": old_tensor(view, torch.Tensor),
        "long": old_tensor(view.long(), torch.LongTensor),
        "v1": Reduced(torch._utils._rebuild_tensor, (view.storage(), 2, (2, 3), (9, 3))),
        "variable": Reduced(torch.autograd.Variable, (view,), state),
        "parameter": Reduced(nn.Parameter, (old_tensor(view),), state),
        "frozen": Reduced(nn.Parameter, (view,), (False, False, OrderedDict())),
        "later": Reduced(nn.Parameter, (view, False)),
    }  # fmt: skip
    with anycard.open(saved(given, new=new)) as ckpt:
        assert set(ckpt.tensors) == set(given)
        parameters = {name: info.requires_grad for name, info in ckpt.tensors.items() if info.parameter}
        assert parameters == {"parameter": True, "frozen": False, "later": False}
        assert not ckpt.tensors["variable"].requires_grad
        for name in given:
            assert_same_bits(ckpt.torch(name), view.long() if name == "long" else view)


@pytest.mark.filterwarnings("ignore:TypedStorage")
@NEW
def test_bare_storages(new: bool) -> None:
    """Typed and untyped ones, of a view, of quantised elements, and empty ones: as one-dimensional tensors."""
    with quiet():
        tensor = torch.quantize_per_tensor(torch.arange(6.0), 0.5, 3, torch.qint8)
    given = {
        "typed": BASE.storage(), "view": torch.arange(9.0)[3:6].storage(), "half": torch.ones(3).bfloat16().storage(),
        "untyped": torch.arange(3).untyped_storage(), "empty": torch.FloatStorage(),
        "quantised": tensor._typed_storage(),
    }  # fmt: skip
    want = {
        "typed.0": BASE.reshape(-1), "view.0": torch.arange(9.0), "half.0": torch.ones(3).bfloat16(),
        "untyped.0": torch.arange(3).view(torch.uint8), "empty.0": torch.empty(0), "quantised.0": tensor.int_repr(),
    }  # fmt: skip
    assert_same(anycard.read(saved(given, new=new), key=None), want)


class Colour(enum.Enum):
    """One of a script's own."""

    RED = "r"


class Level(enum.IntFlag):
    """The same, of numbers."""

    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Config:
    """The same, of settings."""

    lr: float = 0.1
    layers: tuple[int, ...] = (1, 2)


class Slots:
    """The same, without a dict."""

    __slots__ = ("lr",)

    def __init__(self, lr: float) -> None:
        self.lr = lr


class Attributes(dict[str, Any]):
    """A dict with attributes, as many libraries have one."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


HERE = __name__
OBJECTS: dict[str, tuple[Any, Any]] = {
    "namespace": (argparse.Namespace(lr=0.1), {"__class__": "argparse.Namespace", "lr": 0.1}),
    "simple namespace": (types.SimpleNamespace(a=1), {"__class__": "types.SimpleNamespace", "a": 1}),
    "dataclass": (Config(), {"__class__": f"{HERE}.Config", "lr": 0.1, "layers": [1, 2]}),
    "slots": (Slots(0.5), {"__class__": f"{HERE}.Slots", "lr": 0.5}),
    "enum": (Colour.RED, {"__class__": f"{HERE}.Colour", "args": ["r"]}),
    "flag": (Level.LOW | Level.HIGH, {"__class__": f"{HERE}.Level", "args": [3]}),
    "named tuple": (Point(1, 2), {"__class__": f"{HERE}.Point", "args": [1, 2]}),
    "attributes": (Attributes(a=1), {"__class__": f"{HERE}.Attributes", "pairs": [["a", 1]]}),
    "deque": (collections.deque([1], 5), {"__class__": "collections.deque", "args": [[], 5], "items": [1]}),
    "path": (pathlib.PurePosixPath("/a/b"), {"__class__": "pathlib.PurePosixPath", "args": ["/", "a", "b"]}),
    "slice": (slice(1, 2), {"__class__": "builtins.slice", "args": [1, 2, None]}),
    "range": (range(1, 5, 2), {"__class__": "builtins.range", "args": [1, 5, 2]}),
    "ellipsis": (..., "<builtins.Ellipsis>"),
    "date": (datetime.date(2020, 1, 2), {"__class__": "datetime.date", "args": [b"\x07\xe4\x01\x02"]}),
    "time span": (datetime.timedelta(1, 2), {"__class__": "datetime.timedelta", "args": [1, 2, 0]}),
    "decimal": (decimal.Decimal("1.5"), {"__class__": "decimal.Decimal", "args": ["1.5"]}),
    "uuid": (uuid.UUID(int=5), {"__class__": "uuid.UUID", "int": 5}),
    "layout": (torch.sparse_csr, {"__class__": "torch.serialization._get_layout", "args": ["torch.sparse_csr"]}),
    "scheme": (torch.per_channel_affine, "<torch.per_channel_affine>"), "dtype": (torch.int4, "<torch.int4>"),
    "device": (torch.device("cuda:1"), {"__class__": "torch.device", "args": ["cuda", 1]}),
    "class": (nn.Linear, "<torch.nn.modules.linear.Linear>"), "function": (len, "<builtins.len>"),
    "frozen set": (frozenset([1]), [1]), "set": ({1, 2}, [1, 2]), "bytes": (b"\xff", b"\xff"), "complex": (1j, 1j),
    "large": (1 << 200, 1 << 200), "counter": (collections.Counter("aab"), None),
    "numpy scalar": (np.float32(1.5), 1.5),
    "numpy text": (np.str_("a"), None), "numpy dtype": (np.dtype("f4"), None),
    "uninitialised": (nn.UninitializedBuffer(), None),
    "structured": (np.zeros(2, [("a", "i4")]), None), "objects": (np.array([None], object), None),
    "generator": (np.random.default_rng(3), None), "masked": (np.ma.array([1, 2], mask=[0, 1]), None),
    "partial": (functools.partial(torch.add, 1), None), "torch generator": (torch.Generator(), None),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights(kind: str, protocol: int) -> None:
    """Every object is plain data with its class's name, and the weights beside it are read."""
    value, want = OBJECTS[kind]
    with anycard.open(saved({"x": value, "w": torch.arange(5.0)}, pickle_protocol=protocol)) as ckpt:
        assert_same_bits(ckpt.torch("w"), torch.arange(5.0))
        found = ckpt.objects
        assert any(name == "x" or name.startswith("x.") for name in found)
        if want is not None and protocol == 2:
            assert found["x"] == want
        assert "object at 0x" not in repr(found)


class Wrapper(torch.Tensor):
    """A tensor without memory."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


with quiet():
    REFUSED: dict[str, tuple[Any, str]] = {
        "sparse": (torch.eye(2).to_sparse(), "sparse_coo"), "meta": (torch.empty(2, device="meta"), "meta device"),
        "quantised": (torch.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.qint8), "quantised"),
        "nested": (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "nested"),
        "uninitialised": (nn.UninitializedParameter(), "not initialised"), "lazy": (nn.LazyLinear(3),
        "not initialised"),
        "wrapper": (Wrapper(torch.ones(2)), "without memory"), "storage": (BASE.untyped_storage(), "UntypedStorage"),
        "layout": (torch.strided, "layout"), "format": (torch.channels_last, "memory_format"),
        "class": (nn.Linear, "type"), "sets": ({frozenset()}, "that holds sets"), "enum": (Colour.RED, "Colour"),
        "structured": (np.zeros(2, [("a", "i4")]), "torch lacks"), "texts": (np.array(["a"]), "torch lacks"),
        "long double": (np.longdouble(1), "longdouble"), "date": (np.datetime64("2020-01-01"), "datetime64"),
        "masked": (np.ma.array([1]), "MaskedArray"), "polynomial": (np.poly1d([1]), "poly1d"),
        "event": (torch.Event(), "Event"), "generator": (torch.Generator(), "Generator"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_written_is_named(kind: str) -> None:
    """A CheckpointError that names the place and the kind; nothing has been written."""
    value, text = REFUSED[kind]
    file = io.BytesIO()
    with pytest.raises(anycard.CheckpointError, match=rf"config\.1.*{text}"):
        anycard.save({"w": torch.ones(1), "config": [1, value]}, file)
    assert file.getvalue() == b""


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.arange(3, dtype=">f4"), np.asfortranarray(np.eye(3)), np.zeros((0, 3)),
              np.array(2.5), np.arange(6)[::-2], np.array([True]), np.arange(3, dtype="u2")], ids=str)  # fmt: skip
def test_arrays_become_tensors(array: Any) -> None:
    """A numpy array in a dict of objects is written as the tensor of its values."""
    file = io.BytesIO()
    anycard.save({"x": array}, file)
    file.seek(0)
    assert np.array_equal(torch.load(file, weights_only=True)["x"], array)


# Files.


@pytest.mark.parametrize("order", [(True, True), (False, False), (False, True), (True, False)], ids=str)
def test_several_files_in_one(order: tuple[bool, bool]) -> None:
    """From where an open file stands; a legacy stream ends where it ends, a zip takes all that follows."""
    file = io.BytesIO()
    pickle.dump(41, file)
    starts = []
    for value, new in enumerate(order):
        starts.append(file.tell())
        with quiet():
            torch.save({"w": torch.full((3,), float(value))}, file, _use_new_zipfile_serialization=new)
    for value, start in enumerate(starts):
        if value == 0 and order[0]:
            continue  # torch itself takes the last directory of the file
        file.seek(start)
        assert anycard.read(file)["w"].tolist() == [float(value)] * 3


class OnlyRead:
    """An open file that has no `readinto` and no `fileno`."""

    def __init__(self, data: bytes) -> None:
        held = io.BytesIO(data)
        self.read, self.seek, self.tell = held.read, held.seek, held.tell


@NEW
@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_open_files_and_pickle_modules(module: Any, new: bool) -> None:
    """A file-like object with the least that torch asks for; a pickle of another module, lambdas in it too."""
    value: dict[str, Any] = {"w": torch.arange(3.0)}
    if module is cloudpickle:
        value["f"] = lambda x: x + value["w"]
    data = saved(value, new=new, pickle_module=module).getvalue()
    with anycard.open(OnlyRead(data)) as ckpt:
        assert_same_bits(ckpt.torch("w"), value["w"])


@NEW
def test_bytes_that_look_like_a_zip(new: bool) -> None:
    """A tensor whose bytes are a zip's end is a tensor."""
    tensor = torch.tensor([*b"PK\5\6"] + [0] * 100, dtype=torch.uint8)
    assert_same(anycard.read(saved({"w": tensor}, new=new)), {"w": tensor})


def test_a_file_that_is_filled_later(tmp_path: pathlib.Path) -> None:
    """torch.serialization.skip_data leaves room and no checksum: read as it is, and as it is once filled."""
    want = torch.arange(6.0)
    with torch.serialization.skip_data():
        torch.save({"w": want, "b": want[:2]}, tmp_path / "a.pt")
    assert not anycard.read(tmp_path / "a.pt")["w"].any()
    assert set(anycard.verify(tmp_path / "a.pt").unchecked) == {"w", "b"}
    with anycard.open(tmp_path / "a.pt") as ckpt:
        offset = ckpt.tensors["w"].offset
    with (tmp_path / "a.pt").open("r+b") as file:
        file.seek(offset or 0)
        file.write(want.numpy().tobytes())
    assert_same(anycard.read(tmp_path / "a.pt"), {"w": want, "b": want[:2]})
    damaged = bytearray((tmp_path / "a.pt").read_bytes())
    damaged[damaged.index(b"_rebuild_tensor") + 3] ^= 1
    with pytest.raises(anycard.FormatError, match="CRC"):
        anycard.open(io.BytesIO(damaged))


@pytest.mark.parametrize(("option", "value"), [("save.storage_alignment", 4096), ("save.compute_crc32", False)])
def test_options_of_saving(option: str, value: Any) -> None:
    """Storages aligned elsewhere, and no checksums."""
    from torch.utils.serialization import config

    with config.patch({option: value}):
        file = saved({"w": BASE})
    assert_same(anycard.read(file), {"w": BASE})
