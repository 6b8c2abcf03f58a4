"""Indexes that are spelt as usual are read by a short way: what it gives is what the long way gives, for any bytes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from anycard.containers import zip_directory
from anycard.disk.source import StreamSource
from anycard.errors import FormatError
from anycard.formats import safetensors
from anycard.formats.index import Index
from anycard.formats.registry import read_index
from anycard.limits import DEFAULT


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
