"""What a scan follows of a pickle whatever its values are: never less than an unpickler does."""

from __future__ import annotations

import _pickle
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anycard.disk.source import MemorySource
from anycard.errors import FormatError
from anycard.formats.plain_pickle import budget_of
from anycard.limits import DEFAULT
from anycard.pickles import outline as outlines
from anycard.pickles.machine import python_3_name
from anycard.pickles.outline import Outline, outline
from anycard.pickles.recording import Record, record_pickle
from pickle_grammar import expression, opcode
from test_scan_archives import archive_of, bad_names

# What C's unpickler takes and nothing writes, and what the interpreter refuses.
ODD = [
    b"I0x10\n", b"I 5\n", b"I5\0z\n", b"I1_0\n", b"L0x5L\n", b"L-5L\n", b"F1\0z\n", b"Finf\n", b"NNb", b"]Nb",
    b"\x8b\xd0\x07\0\0" + b"\1" * 2_000, b"C\x01a\x98", b"](K\x00K\x01eK\x00K\x05s",
    b"\x96\x01" + bytes(7) + b"aK\x05a",
    b"}(" + b"N" * 1_100 + b"tNs", b"VX\n", b"S'os'\n", b"(0(1N", b"N2",
    b"}(" + b"".join(b"L%d\nN" % (n * ((1 << 61) - 1)) for n in range(400)) + b"u",
]  # fmt: skip


class Taken:
    """Takes whatever a pickle does to it."""

    def __new__(cls, *args: Any, **more: Any) -> Taken:
        return object.__new__(cls)

    def __init__(self, *args: Any, **more: Any) -> None: ...
    def __call__(self, *args: Any, **more: Any) -> Taken:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...
    def __hash__(self) -> int:
        return 1

    add = append = extend = __setstate__ = lambda self, value: None


def seen_by(unpickler: type[Any], data: bytes, buffered: bool) -> list[tuple[str, str]]:
    """The globals that an unpickler of Python's asks for; it gets something for each."""
    seen: list[tuple[str, str]] = []

    class Watched(unpickler):
        def find_class(self, module: str, name: str) -> Any:
            seen.append((module, name))
            return (Taken, Taken(), lambda *args: "text", list, dict)[len(module + name + data[:9].hex()) % 5]

    file = io.BytesIO(data)
    try:
        Watched(io.BufferedReader(file) if buffered else file).load()
    except Exception:  # noqa: BLE001 - whatever a broken pickle makes of it
        return seen if unpickler is _pickle.Unpickler else seen[:-1]  # Python's looks for a name before it needs it
    return seen


def random_pickle(draw: random.Random) -> bytes:
    """Opcodes in any order; a bit may be wrong."""
    short = [*ODD, b"R", b"o", b"b", b"e", b"t", b"\x94", b"h\0", b"q\0", b"(ios\nx\n", b"\x8c\x02os" * 2]
    parts: list[Callable[[], bytes]] = [
        lambda: draw.choice(short), lambda: opcode(draw), lambda: expression(draw, 2),
        lambda: b"\x80" + bytes([draw.randrange(7)]),
    ]  # fmt: skip
    data = bytearray(b"".join(draw.choice(parts)() for _ in range(draw.randrange(2, 25))) + b".")
    at = draw.randrange(len(data))
    if draw.random() < 0.2 and data[at]:  # a length of gigabytes is made, and filled, by Python
        data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


def missed(seen: list[tuple[str, str]], told: Any) -> list[tuple[str, str]]:
    """Names below protocol 3 are Python 2's, and a computed name may be any."""
    if ("(a computed name)", "") in told:
        return []
    return [place for place in seen if place not in told and python_3_name(*place) not in told]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("unpickler", [_pickle.Unpickler, pickle._Unpickler])
@pytest.mark.parametrize("ahead", [1, 64 << 10])
def test_no_unpickler_goes_further(monkeypatch: pytest.MonkeyPatch, unpickler: type[Any], ahead: int) -> None:
    """Of random opcodes, all that C's and Python's unpicklers ask for is in the outline, and in a whole record."""
    monkeypatch.setattr(outlines, "_AHEAD", ahead)
    draw = random.Random(f"{unpickler}{ahead}")
    asked = whole = 0
    for _ in range(3_000):
        data = random_pickle(draw)
        found = outline(MemorySource("random", data), ids=False)
        if found.torn:
            continue
        seen = seen_by(unpickler, data, draw.random() < 0.5)
        assert not missed(seen, found.globals), data
        asked += bool(seen)
        record = Record()
        try:
            record_pickle(data, 0, budget_of(data, None, DEFAULT), record)
        except FormatError:
            continue
        whole += 1
        assert not missed(seen, record.globals), data
    assert asked > 500 and whole > 50


@pytest.mark.parametrize("prefix", ODD)
def test_what_the_interpreter_refuses_hides_nothing(tmp_path: Path, prefix: bytes) -> None:
    """`pickle.load` goes on behind it: what it would call is told by name."""
    data = b"N" + prefix + b"0cabsent\nname\n)R."
    with pytest.raises(ModuleNotFoundError, match="absent"):
        pickle.loads(data)
    (tmp_path / "a.pkl").write_bytes(data)
    assert bad_names(tmp_path / "a.pkl") == (1, ["absent.name"])
    (tmp_path / "a.zip").write_bytes(archive_of({"weights": data}))
    assert bad_names(tmp_path / "a.zip") == (1, ["absent.name"])


def test_texts_end_early() -> None:
    """What is no opcode, asks for what is not on the stack, or is no number, ends every unpickler."""
    for words in (b"import os\nimport sys\n", b"In short\n", b"License: MIT\n", b"class A:\n    pass\n", b"S' x\n"):
        found = outline(MemorySource("words", words))
        assert not found.calls and not found.end
    assert outline(MemorySource("words", b"cat\ndog\nbird\n")) == Outline({("at", "dog"): 0})
