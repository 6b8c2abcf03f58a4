"""The least that Python takes to bring a file's tensors into a model by their names; says how far we are from it.

Nothing is checked, neither the file nor the model, lies are believed, and nothing is kept for a way back.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anycard.disk.vectors import MOST_ROWS, read_table
from speed.checks import Act, Check, same_module
from speed.floors import CHUNK
from speed.loading import existing
from speed.subjects import Subject

_SCRATCH = np.empty(1 << 16, np.uint8)  # for what lies between tensors
Places = Callable[[BinaryIO], dict[str, tuple[int, int]]]
_END = struct.Struct("<4s4H2L")
_FIXED = struct.Struct("<20x2L2H10xL")  # of a directory's entry: stored bytes, bytes, name's and extra's sizes, header


def scattered(subject: Subject, path: Path) -> tuple[Act, Check]:
    """A bare loop that knows each tensor's place in the file and in memory before the clock runs."""
    model = existing(subject)
    with path.open("rb") as file:
        calls = list(_calls(_rows(model, PLACES[path.suffix](file))))

    def act() -> nn.Module:
        with path.open("rb", buffering=0) as file:
            _read(file.fileno(), calls)
        return model

    return act, same_module(subject)


def into(subject: Subject, path: Path) -> tuple[Act, Check]:
    """The file's index read, tensors met by name, few calls to read."""
    model = existing(subject)

    def act() -> nn.Module:
        with path.open("rb", buffering=0) as file:
            _read(file.fileno(), list(_calls(_rows(model, PLACES[path.suffix](file)))))
        return model

    return act, same_module(subject)


def _safetensors(file: BinaryIO) -> dict[str, tuple[int, int]]:
    start = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    return {name: (start + row["data_offsets"][0], start + row["data_offsets"][1]) for name, row in header.items()}


def _zip(file: BinaryIO) -> dict[str, tuple[int, int]]:
    records = _records(file)
    begin, end = records["data.pkl"]
    pickled = BytesIO(os.pread(file.fileno(), end - begin, begin))
    held: dict[str, str] = _Unpickler(BufferedReader(pickled, end - begin)).load()  # buffered, it may look ahead
    return {name: records[f"data/{key}"] for name, key in held.items()}


class _Unpickler(pickle.Unpickler):
    """C's, which gives a storage's key for each tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return _key
        return OrderedDict if name == "OrderedDict" else name

    def persistent_load(self, pid: Any) -> str:
        key: str = pid[2]
        return key


def _key(key: str, *_: object) -> str:
    return key


def _records(file: BinaryIO) -> dict[str, tuple[int, int]]:
    size = file.seek(0, os.SEEK_END)
    tail = os.pread(file.fileno(), 1 << 16, max(0, size - (1 << 16)))
    *_, count, nbytes, start = _END.unpack_from(tail, tail.rindex(b"PK\x05\x06"))
    directory = os.pread(file.fileno(), nbytes, start)
    records, at = {}, 0
    for _ in range(count):
        _, stored, name_size, extra_size, header = _FIXED.unpack_from(directory, at)
        name = directory[at + 46 : at + 46 + name_size].decode()
        sizes = os.pread(file.fileno(), 4, header + 26)
        begin = header + 30 + name_size + int.from_bytes(sizes[2:], "little")
        records[name.partition("/")[2]] = begin, begin + stored
        at += 46 + name_size + extra_size
    return records


PLACES: dict[str, Places] = {".safetensors": _safetensors, ".pth": _zip}


def _rows(model: nn.Module, places: dict[str, tuple[int, int]]) -> NDArray[np.uint64]:
    """Offset, end, address of each tensor, in the order of the file."""
    own: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        own.update({dot + name: tensor for name, tensor in module._parameters.items() if tensor is not None})
        own.update({dot + name: tensor for name, tensor in module._buffers.items() if tensor is not None})
    rows = sorted((*place, own[name].data_ptr()) for name, place in places.items())
    return np.array(rows, np.uint64)


def _calls(rows: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Where a call begins, and the places it fills."""
    first = 0
    while first < len(rows):
        begin, end, address = rows[first].tolist()
        if end - begin > CHUNK:
            for at in range(begin, end, CHUNK):
                yield at, np.array([(address + at - begin, min(CHUNK, end - at))], np.uint64)
            first += 1
            continue
        last = max(first + 1, int(np.searchsorted(rows[:, 1], begin + CHUNK, side="right")))
        part = rows[first : min(last, first + MOST_ROWS // 2)]
        table = np.zeros((2 * len(part), 2), np.uint64)
        table[::2, 0], table[::2, 1] = part[:, 2], part[:, 1] - part[:, 0]
        table[1::2, 0], table[1:-1:2, 1] = _SCRATCH.ctypes.data, part[1:, 0] - part[:-1, 1]
        yield begin, table[table[:, 1] > 0]
        first += len(part)


def _read(fd: int, calls: list[tuple[int, NDArray[np.uint64]]]) -> None:
    """By two threads that each take the next call."""
    turns = iter(calls)  # next() of a list's iterator holds the interpreter's lock

    def work() -> None:
        for offset, table in turns:
            read_table(fd, offset, table)

    helper = threading.Thread(target=work)
    helper.start()
    work()
    helper.join()
