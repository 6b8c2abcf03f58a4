"""A device that moves fewer bytes than it is asked for, and signals meanwhile: every path is exact all the same."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import anycard
from anycard.disk import vectors
from helpers import assert_same, filled, unchanged, weights

few = pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads and writes by vectors are Linux's and BSD's")


class Net(nn.Module):
    """Small tensors, one that is read in parts, one whose strides are not the file's."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ParameterList([nn.Parameter(torch.zeros(7)) for _ in range(20)])
        self.large = nn.Parameter(torch.zeros(300, 400))
        self.turned = nn.Parameter(torch.zeros(30, 20).t())
        self.register_buffer("halves", torch.zeros(50, dtype=torch.float16))


def other_dtype() -> Net:
    return Net().to(torch.float64)


@contextlib.contextmanager
def slow_device(monkeypatch: pytest.MonkeyPatch, most: int) -> Iterator[list[int]]:
    """The system's own calls, each asked for at most so many bytes; gives how many calls were cut short."""
    cut = [0]
    preadv, pread, pwritev = os.preadv, os.pread, os.pwritev

    def short_preadv(fd: int, views: Sequence[memoryview], *where: int) -> int:
        cut[0] += len(views[0]) > most
        return preadv(fd, [views[0][:most]], *where)

    def short_pwritev(fd: int, views: Sequence[memoryview], *where: int) -> int:
        cut[0] += len(views[0]) > most
        return pwritev(fd, [views[0][:most]], *where)

    def short_vectors(call: Callable[..., int], fd: int, address: int, rows: int, offset: int) -> int:
        """The C library's call, up to the place in which the bytes run out; every third is interrupted."""
        table = np.ctypeslib.as_array((ctypes.c_uint64 * (2 * rows)).from_address(address)).reshape(-1, 2).copy()
        before = np.cumsum(table[:, 1]) - table[:, 1]
        table = table[before < most]
        cut[0] += bool(len(table) < rows or table[:, 1].sum() > most)
        table[-1, 1] = min(int(table[-1, 1]), most - int(before[len(table) - 1]))
        if next(calls) % 3 == 1:
            ctypes.set_errno(errno.EINTR)
            return -1
        return int(call(fd, table.ctypes.data, len(table), offset))

    calls = itertools.count()
    monkeypatch.setattr(vectors, "_PREADV", partial(short_vectors, vectors._PREADV))
    monkeypatch.setattr(vectors, "_PWRITEV", partial(short_vectors, vectors._PWRITEV))
    monkeypatch.setattr(os, "preadv", short_preadv)
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, where: pread(fd, min(nbytes, most), where))
    monkeypatch.setattr(os, "pwritev", short_pwritev)
    yield cut
    monkeypatch.undo()


@few
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("most", [1, 1000, 100_000])
def test_fewer_bytes_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    if most == 1:
        source: nn.Module = filled(nn.Linear(5, 4))
        targets = [nn.Linear(5, 4)]
    else:
        source, targets = filled(Net()), [Net(), other_dtype()]
    with slow_device(monkeypatch, most) as cut:
        anycard.save(source, tmp_path / name)
        anycard.convert(tmp_path / name, tmp_path / f"again-{name}")
        for path in (tmp_path / name, tmp_path / f"again-{name}"):
            assert_same(anycard.read(path), weights(source))
            assert anycard.verify(path).ok
            for target in targets:
                anycard.load(path, target)
                want = {k: v.to(target.state_dict()[k].dtype) for k, v in weights(source).items()}
                assert_same(weights(target), want)
        assert cut[0]


def stop(done: int, total: int) -> None:
    """The user's interrupt, once half of the bytes have come."""
    if done > total // 2:
        raise KeyboardInterrupt


@few
@pytest.mark.parametrize("most", [100, 100_000])
def test_the_way_back_by_fewer_bytes_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The copy of the old values, and what is read from it, come in parts as well."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    model = filled(Net(), 5)
    with unchanged(model), slow_device(monkeypatch, most) as cut, pytest.raises(KeyboardInterrupt):
        anycard.load(tmp_path / "a.pth", model, progress=stop)
    assert cut[0]


@pytest.mark.parametrize("fault", ["none there", "none left", "full"])
def test_the_way_back_without_files_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A system that has no files in memory, gives no more, or has no room: the old values are kept elsewhere."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    model = filled(Net(), 5)

    def refused(*args: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    if fault == "none there":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif fault == "none left":
        monkeypatch.setattr(os, "memfd_create", refused, raising=False)
    else:
        monkeypatch.setattr(vectors, "write_table", refused)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        anycard.load(tmp_path / "a.pth", model, progress=stop)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the process's descriptors")
def test_the_way_back_is_let_go(tmp_path: Path) -> None:
    """No file stays open behind a load that went well or failed."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    model, before = Net(), len([*Path("/proc/self/fd").iterdir()])
    anycard.load(tmp_path / "a.pth", model)
    with pytest.raises(KeyboardInterrupt):
        anycard.load(tmp_path / "a.pth", model, progress=stop)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


class Dribble(io.BytesIO):
    """An open file that gives a few bytes at a time, as a socket or a decompressor may."""

    def read(self, nbytes: int | None = -1) -> bytes:
        return super().read(nbytes if nbytes is None or nbytes < 0 else min(nbytes, 777))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_an_open_file_that_gives_a_few_bytes(tmp_path: Path, name: str) -> None:
    source, model = filled(Net()), Net()
    anycard.save(source, tmp_path / name)
    anycard.load(Dribble((tmp_path / name).read_bytes()), model)
    assert_same(weights(model), weights(source))


@pytest.mark.skipif(sys.platform == "win32", reason="no interval timer there")
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_signals_meanwhile(tmp_path: Path, name: str) -> None:
    source, model = filled(nn.Linear(1500, 1500)), nn.Linear(1500, 1500)
    got: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: got.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(5):
            anycard.save(source, tmp_path / name)
            anycard.load(tmp_path / name, model)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert got
    assert_same(weights(model), weights(source))
