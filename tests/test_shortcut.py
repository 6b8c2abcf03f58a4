"""A tensor's description read in one step is what the interpreter reads in thirty: the same object, the same memo."""

from __future__ import annotations

import io
import itertools
import pickletools
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import anycard
from anycard.errors import FormatError
from anycard.limits import DEFAULT
from anycard.pickles.budget import Budget
from anycard.pickles.machine import Machine, guarded
from anycard.pickles.stubs import Inert
from anycard.pickles.views import StoredStorage
from anycard.tensors import Storage, TensorInfo


def pickle_of(obj: Any) -> bytes:
    """The pickle in the file that torch.save makes."""
    file = io.BytesIO()
    torch.save(obj, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def read(data: bytes, *, shortcut: bool, rows: bool = False) -> tuple[Any, int]:
    """The object as text that shows all of it, and how many steps the interpreter was spared."""
    storages: dict[str, Storage] = {}

    def load(pid: Any) -> StoredStorage:
        key = pid[2]
        return pid[1].of(storages.setdefault(key, Storage(key, 1 << 20)), pid[4])

    machine = Machine(data, 0, load, Budget(DEFAULT, len(data)))
    taken = machine.shortcut
    if not shortcut:
        machine.shortcut = None
    tree, _ = guarded(machine, 0)
    return shown(tree), 0 if taken is None else taken.in_rows if rows else taken.taken


def shown(value: Any) -> Any:
    """All that an inert object holds, by value."""
    if isinstance(value, TensorInfo):
        return (
            "tensor",
            value.dtype,
            value.shape,
            value.stride,
            value.start,
            shown(value.storage.key),
            value.requires_grad,
        )
    if isinstance(value, StoredStorage):
        return ("storage", value.numel, value.start, None if value.storage is None else shown(value.storage.key))
    if isinstance(value, Inert):
        return ("inert", value.path, shown(value.args), shown(value.state))
    if isinstance(value, dict):
        pairs = [(shown(k), shown(v)) for k, v in value.items()]
        return [type(value).__name__, pairs, shown(vars(value)) if hasattr(value, "__dict__") else ()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(shown, value)]
    return value if not isinstance(value, type) else ("class", value.__name__)


def state(count: int = 40) -> dict[str, torch.Tensor]:
    shapes = [(), (3,), (2, 3), (2, 3, 4), (2, 1, 3, 2), (300, 2), (0, 5), (1, 1, 1, 1, 2)]
    held = {f"layer{i}.weight": torch.zeros(shapes[i % len(shapes)]) for i in range(count)}
    held["half"] = torch.zeros(4, dtype=torch.float16)
    held["half again"] = torch.zeros(4, 3, dtype=torch.float16).t()
    held["tied"] = held["layer3.weight"]
    held["a part"] = held["layer5.weight"][7:9]
    held["grad"] = torch.zeros(2, requires_grad=True)
    return held


def test_files_of_ours_which_name_each_shape_once(tmp_path: Path) -> None:
    anycard.save(state(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        data = archive.read("archive/data.pkl")
    fast, passed = read(data, shortcut=True)
    assert fast == read(data, shortcut=False)[0]
    assert passed > 30


@pytest.mark.parametrize("wrap", [dict, lambda held: {"model": held, "again": list(held.values()), "epoch": 3}])
def test_the_same_tree(wrap: Any) -> None:
    data = pickle_of(wrap(state()))
    fast, passed = read(data, shortcut=True)
    assert fast == read(data, shortcut=False)[0]
    assert passed > 30


def test_what_was_passed_by_is_in_the_memo() -> None:
    data = pickle_of(state(12))
    puts = [arg for op, arg, _ in pickletools.genops(data) if op.name in ("BINPUT", "LONG_BINPUT")]
    assert data[-2:] == b"u."
    for index in puts[1:]:  # the first is the dict itself
        asked = data[:-2] + b"X\3\0\0\0ask" + b"h" + bytes([index]) + b"u."
        assert read(asked, shortcut=True)[0] == read(asked, shortcut=False)[0]


def test_memoize_counts_what_was_passed_by() -> None:
    data = pickle_of(state(12))
    last = max(arg for op, arg, _ in pickletools.genops(data) if op.name == "BINPUT")
    asked = data[:-2] + b"X\3\0\0\0ask" + b"X\3\0\0\0new\x94" + b"h" + bytes([last + 1]) + b"X\1\0\0\0zu."
    asked = asked.replace(b"X\1\0\0\0zu.", b"0u.")
    assert read(asked, shortcut=True)[0] == read(asked, shortcut=False)[0]


def test_a_place_of_the_memo_that_is_relied_on_is_not_written_again() -> None:
    data = pickle_of(state(6))
    location = re.search(rb"X\x03\0\0\0cpuq(.)", data, re.DOTALL)
    assert location is not None
    lie = data[:-2] + b"X\3\0\0\0lieq" + location[1] + b"0X\1\0\0\0aNu."
    with pytest.raises(FormatError, match="twice"):
        read(lie, shortcut=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (rb"X\x01\0\0\0\dq", b"X\x02\0\0\0*q"),  # a key that is longer than it says
        (rb"K\x02K\x03\x86", b"K\x02K\x03\x87"),  # three sizes of which two are there
        (rb"K\x03\x85", b"K\x03\x86"),
        (rb"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"),  # a negative size
        (rb"QK\0", b"QJ\xff\xff\xff\xff"),  # a negative offset
        (rb"QK\0", b"QJ\xff\xff\xff\x7f"),  # an offset beyond the storage
        (rb"\x89h.\)R", b"\x89h\x01)R"),  # hooks that are no OrderedDict
    ],
)
def test_a_lie_ends_as_it_does_without(old: bytes, new: bytes) -> None:
    data = pickle_of(state(24))
    found = list(re.finditer(old, data, re.DOTALL))
    assert found
    place = found[-1]
    lie = data[: place.start()] + new.replace(b"*", place[0][5:6]) + data[place.end() :]
    outcomes = []
    for shortcut in (True, False):
        try:
            outcomes.append(read(lie, shortcut=shortcut)[0])
        except FormatError as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_lie_ends_as_it_does_without(data: st.DataObject) -> None:
    """Bytes changed anywhere, mostly numbers of puts and gets: the same object, or an error both ways."""
    pickled = bytearray(PICKLES[data.draw(st.integers(0, len(PICKLES) - 1))])
    places = [
        at + 1
        for op, _, at in pickletools.genops(bytes(pickled))
        if op.name in ("BINPUT", "BINGET", "LONG_BINPUT", "LONG_BINGET", "BINUNICODE", "TUPLE2", "BININT1") and at
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(places) | st.integers(2, len(pickled) - 1))
        pickled[at] = data.draw(st.integers(0, 60) | st.sampled_from(pickled))
    outcomes = []
    for shortcut in (True, False):
        try:
            outcomes.append(read(bytes(pickled), shortcut=shortcut)[0])
        except FormatError:
            outcomes.append("refused")
        except RecursionError:  # a dict that holds itself cannot be shown
            return
    if outcomes[0] != "refused":  # what relies on a place of the memo that is written twice is refused
        assert outcomes[0] == outcomes[1]


def ours(state: dict[str, torch.Tensor]) -> bytes:
    """The pickle in the file that anycard.save makes, which spells each shape once."""
    with tempfile.TemporaryDirectory() as folder:
        anycard.save(state, Path(folder) / "a.pth")
        with zipfile.ZipFile(Path(folder) / "a.pth") as archive:
            return archive.read("archive/data.pkl")


PICKLES = [
    pickle_of(state(9)),
    pickle_of({"a": torch.ones(1), "b": torch.ones(1, 1), "c": torch.ones(())}),
    pickle_of(state(60)),
    ours(state(60) | {f"late{i}": torch.zeros(300 + i // 2, 1) for i in range(40)}),
    pickle_of({"model": nn.Sequential(*(nn.Linear(1, 1) for _ in range(70))).state_dict(), "epoch": 1}),
]


@pytest.mark.parametrize("data", PICKLES[2:], ids=["torch", "anycard", "metadata"])
def test_rows_are_in_the_memo_when_asked_for(data: bytes) -> None:
    puts = [arg for op, arg, _ in pickletools.genops(data) if op.name in ("BINPUT", "LONG_BINPUT")]
    assert data[-2:] == b"u." and puts[-1] > 400
    assert read(data, shortcut=True, rows=True)[1] > 15
    for index in [*puts[1:], puts[-1] + 1]:
        asked = data[:-2] + b"X\3\0\0\0ask" + b"j" + index.to_bytes(4, "little") + b"u."
        try:
            wanted = read(asked, shortcut=False)[0]
        except FormatError:
            assert index > puts[-1]
            with pytest.raises(FormatError):
                read(asked, shortcut=True)
        else:
            assert read(asked, shortcut=True)[0] == wanted


@pytest.mark.parametrize("data", PICKLES[2:], ids=["torch", "anycard", "metadata"])
@pytest.mark.parametrize("name", ["LONG_BINPUT", "LONG_BINGET", "BINGET", "BINUNICODE"])
def test_a_lie_in_a_row_ends_as_it_does_without(data: bytes, name: str) -> None:
    """Each number of its kind is changed a little, and what that may change is asked for at the end."""
    whole = {"LONG_BINPUT": 4, "LONG_BINGET": 4, "BINGET": 1, "BINUNICODE": 4}[name]
    found = [(at + 1, arg) for op, arg, at in pickletools.genops(data) if op.name == name and at > len(data) // 4]
    ops = [(op.name, arg) for op, arg, _ in pickletools.genops(data)]
    last = max(arg for op, arg in ops if op == "LONG_BINPUT")
    last_sizes = max(put for (op, _), (_, put) in itertools.pairwise(ops) if op == "TUPLE2")
    for at, arg in found[:: max(1, len(found) // 60)]:
        told = len(arg.encode()) if isinstance(arg, str) else arg
        near = range(told - 1, told + (20 if name == "LONG_BINGET" else 4))
        for lie in {*near, max(told - 8, 0), min(300, 256**whole - 1), last, last_sizes} - {told}:
            if 0 <= lie < 256**whole:
                asked = data[:-2] + b"".join(
                    b"X\3\0\0\0as%dj" % n + index.to_bytes(4, "little") for n, index in enumerate((told, lie))
                )
                lied = asked[:at] + lie.to_bytes(whole, "little") + asked[at + whole :] + b"u."
                assert outcome(lied, shortcut=True) == outcome(lied, shortcut=False)


@pytest.mark.parametrize("number", range(0, 30, 2))
def test_a_row_that_does_not_count_says_nothing_of_others(number: int) -> None:
    """A row whose places are wrong claims those of a row before it, whose sizes a third takes from the memo."""
    data = bytearray(PICKLES[3])
    ops = [(op.name, arg, at) for op, arg, at in pickletools.genops(bytes(data))]
    names = (f"late{number}", f"late{number + 2}")
    late = [at for name, arg, at in ops if name == "BINUNICODE" and arg in names]
    puts = [[(arg, at) for name, arg, at in ops if name == "LONG_BINPUT" and at > start][3] for start in late]
    places = [at for name, arg, at in ops if name in ("LONG_BINPUT", "LONG_BINGET") and arg == puts[1][0]]
    for at in places:
        data[at + 1 : at + 5] = puts[0][0].to_bytes(4, "little")
    assert outcome(bytes(data), shortcut=False) != "refused"
    assert outcome(bytes(data), shortcut=True) == outcome(bytes(data), shortcut=False)


def outcome(data: bytes, *, shortcut: bool) -> Any:
    try:
        return read(data, shortcut=shortcut)[0]
    except (FormatError, RecursionError):
        return "refused"


def test_memoize_counts_rows() -> None:
    data = PICKLES[2]
    last = max(arg for op, arg, _ in pickletools.genops(data) if op.name == "LONG_BINPUT")
    asked = data[:-2] + b"X\3\0\0\0new\x94X\1\0\0\0z0" + b"j" + (last + 1).to_bytes(4, "little") + b"u."
    assert read(asked, shortcut=True)[0] == read(asked, shortcut=False)[0]


def test_a_place_of_a_row_is_written_again() -> None:
    data = PICKLES[2]
    last = max(arg for op, arg, _ in pickletools.genops(data) if op.name == "LONG_BINPUT").to_bytes(4, "little")
    asked = data[:-2] + b"X\3\0\0\0newr" + last + b"X\1\0\0\0z0" + b"j" + last + b"u."
    assert read(asked, shortcut=True)[0] == read(asked, shortcut=False)[0]
