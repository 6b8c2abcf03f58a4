"""Indexes that are spelt as usual are read by a short way: what it gives is what the long way gives, for any bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import anycard
from anycard.containers import zip_directory
from anycard.disk.source import StreamSource
from anycard.errors import FormatError
from anycard.formats import safetensors
from anycard.formats.index import Index
from anycard.formats.registry import read_index
from anycard.limits import DEFAULT
from anycard.torch import planning
from helpers import filled


def index(data: bytes) -> Index:
    return read_index(StreamSource("test", io.BytesIO(data)), DEFAULT)


def told(data: bytes) -> Any:
    """All that an index says, or the refusal."""
    try:
        found = index(data)
    except FormatError as error:
        return str(error), error.offset, error.name
    tensors = {name: (t.dtype, t.shape, t.stride, t.offset, t.storage.key) for name, t in found.tree.items()}
    return tensors, found.metadata, found.records


def both(data: bytes, module: Any, short_way: str) -> bool:
    """The long way gives the same; whether the short one was taken."""
    taken = []
    real = getattr(module, short_way)

    def noted(*args: Any) -> Any:
        taken.append(real(*args))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, short_way, noted)
        found = told(data)
        patch.setattr(module, short_way, lambda *args: None)
        assert told(data) == found
    return taken[-1:] != [None] and bool(taken)


class Batches(nn.Module):
    """Buffers that are stored and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    return model


class Extra(nn.Linear):
    """With an extra state."""

    def get_extra_state(self) -> Any:
        return {"count": 3}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


class Hooked(nn.Linear):
    """A hook renames on load."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_load_state_dict_pre_hook(lambda module, state, *rest: None)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
    "batches": Batches,
    "tied": tied,
    "parallel": lambda: nn.DataParallel(Batches()),
    "averaged": lambda: AveragedModel(Batches()),
    "extra": lambda: nn.Sequential(Extra(2, 2)),
    "hooked": Hooked,
    "empty": lambda: nn.ReLU(),
    "complex": lambda: nn.Linear(2, 2, dtype=torch.complex64),
    "meta": lambda: nn.Linear(2, 2, device="meta"),
    "transposed": lambda: nn.ParameterDict({"a": nn.Parameter(torch.zeros(3, 2).t())}),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("change", ["", "lacks one", "one more", "other shape", "other dtype", "below"])
@pytest.mark.parametrize("name", BUILDS)
def test_plans(tmp_path: Path, name: str, change: str, suffix: str) -> None:
    """Where all agrees nothing is planned; planning all the same gives that very plan."""
    build = BUILDS[name]
    source = filled(build()) if name != "meta" else filled(nn.Linear(2, 2))
    state = dict(source.state_dict())
    first = next(iter(state), "")
    if change == "lacks one":
        state.pop(first, None)
    elif change == "one more":
        state["more"] = torch.ones(2)
    elif change == "other shape" and state:
        state[first] = torch.ones(7)
    elif change == "other dtype" and state:
        state[first] = torch.ones(state[first].shape, dtype=torch.float16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3} if change == "below" else state, path)
    elif "_extra_state" in "".join(state) or not state:
        return
    else:
        save_file({key: held.contiguous().clone() for key, held in state.items()}, path)
    plans = []
    for short in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not short:
                patch.setattr(planning, "_agreeing", lambda *args: None)
            try:
                plans.append(anycard.plan(path, build()))
            except anycard.CheckpointError as error:
                plans.append(str(error))
    assert plans[0] == plans[1]
    assert list(getattr(plans[0], "pairs", ())) == list(getattr(plans[1], "pairs", ()))


NAMES = st.sampled_from(
    ["a", "b.weight", "naïve", 'quote\\"d', "back\\\\slash", "line\\n", "tab\t", "__metadata__", ""]
)
SHAPES = st.sampled_from(["", "2", "2,3", "0", "02", "2,,3", "2,", "-1", "2.0", "1e2", " 2", "9" * 30, "0," + "9" * 30])
NUMBERS = st.sampled_from(["0", "8", "24", "00", "-0", "1.0", "9" * 19, "9" * 25])
METADATA = st.sampled_from(
    ["", '"__metadata__":{"format":"pt"},', '"__metadata__":{},', '"__metadata__":{"a":1},', '"__metadata__":[],',
     '"__metadata__":{"a":"b","a":"c"},', '"__metadata__": {"a":"b"},', '"__metadata__":' + "[" * 5000 + ","]
)  # fmt: skip


@st.composite
def headers(draw: st.DrawFn) -> str:
    """Entries that follow one another, some of them spelt in another way or wrong."""
    entries, at = [], 0
    for number in range(draw(st.integers(0, 4))):
        odd = draw(st.sampled_from(["", "", "name", "shape", "code", "begin", "end"]))  # what is odd about it
        name = draw(NAMES) if odd == "name" else f"t{number}"
        shape = draw(SHAPES) if odd == "shape" else draw(st.sampled_from(["2", "2,3", "", "0"]))
        code = draw(st.sampled_from(["I32", "F4", "Q9"])) if odd == "code" else "F32"
        size = {"2": 8, "2,3": 24, "": 4, "0": 0}.get(shape, 4)
        begin = draw(st.one_of(st.just(f"0{at}"), NUMBERS)) if odd == "begin" else str(at)
        end = draw(st.one_of(st.just(f"0{at + size}"), NUMBERS)) if odd == "end" else str(at + size)
        entries.append(f'"{name}":{{"dtype":"{code}","shape":[{shape}],"data_offsets":[{begin},{end}]}}')
        at += size
    order = draw(st.permutations(entries)) if draw(st.integers(0, 4)) == 0 else entries
    text = "{" + draw(METADATA) + ",".join(order) + "}"
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from([" ", ",", "}", '"', "x", "\n", ""])) + text[place + 1 :]
    return text + draw(st.sampled_from(["", "   ", "\n"]))


@settings(max_examples=400)
@given(text=headers(), spare=st.integers(-4, 4))
def test_safetensors_headers(text: str, spare: int) -> None:
    head = text.encode()
    both(len(head).to_bytes(8, "little") + head + bytes(max(0, 24 + spare)), safetensors, "_spelt_as_usual")


def test_the_usual_header_is_read_by_the_short_way() -> None:
    given_tensors = {"a": torch.arange(4.0), "b": torch.zeros(0, 3), "c": torch.ones(2, 2, dtype=torch.int64)}
    for metadata in (None, {"format": "pt"}):
        assert both(save(given_tensors, metadata), safetensors, "_spelt_as_usual")


def saved(count: int) -> bytes:
    out = io.BytesIO()
    torch.save({f"t{number}": torch.arange(number + 1.0) for number in range(count)}, out)
    return out.getvalue()


ARCHIVE = saved(6)


def test_the_usual_directory_is_read_by_the_short_way() -> None:
    assert both(ARCHIVE, zip_directory, "_usual")


@settings(max_examples=400)
@given(data=st.data())
def test_zip_directories(data: st.DataObject) -> None:
    """A few bytes of the directory or of a local header are others."""
    changed = bytearray(ARCHIVE)
    directory = ARCHIVE.index(b"PK\x01\x02")
    headers_at = [at for at in range(directory) if ARCHIVE.startswith(b"PK\x03\x04", at)]
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            place = data.draw(st.integers(directory, len(ARCHIVE) - 1))
        else:
            place = data.draw(st.sampled_from(headers_at)) + data.draw(st.integers(0, 60))
        changed[place] = data.draw(st.sampled_from([0, 1, 2, 8, 30, 46, 0x50, 0xFF]))
    both(bytes(changed), zip_directory, "_usual")
