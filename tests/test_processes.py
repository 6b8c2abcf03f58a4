"""Several processes at once: real gloo ranks, saves that are killed, loads side by side, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, filled, only_file, weights

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TESTS = str(Path(__file__).parent)
HEAD = """
import os, sys, time
sys.path.insert(0, TESTS)
import torch, anycard
from torch import nn
from helpers import assert_same, filled, weights
def build():
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
"""
RANKS = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/../store", rank=rank, world_size=world)
try:
    main()
finally:
    dist.destroy_process_group()
"""


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process with the tests' helpers, running this code."""
    text = HEAD.replace("TESTS", repr(TESTS)) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", text, *map(str, args)], stdout=subprocess.PIPE, text=True)


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for all; every one ended well. Gives what each printed."""
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def run_ranks(code: str, folder: Path, world: int = 2) -> list[str]:
    """Run `main()` of this code on real gloo ranks."""
    (folder.parent / "store").unlink(missing_ok=True)
    text = textwrap.dedent(code) + RANKS
    return finish([start(text, rank, world, folder) for rank in range(world)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for the files alone."""
    inner = tmp_path / "files"
    inner.mkdir()
    return inner


def test_a_model_that_is_sharded_while_it_lives_is_refused_by_name(folder):
    """FSDP2's parameters are neither saved nor filled yet: both say so, the model keeps its values."""
    code = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    def main():
        anycard.save(filled(build()), f"{folder}/a{rank}.pth")
        model = filled(build(), 5)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        before = [p.to_local().clone() for p in model.parameters()]
        for call, *args in ((anycard.load, f"{folder}/a{rank}.pth", model), (anycard.save, model, f"{folder}/b.pth")):
            try:
                call(*args)
            except anycard.CheckpointError as error:
                assert "0.weight is a DTensor" in str(error), error
            else:
                raise AssertionError("went through")
        assert all(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters()))
    """
    run_ranks(code, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["a0.pth", "a1.pth"]


def test_ranks_that_save(folder):
    """All DDP ranks save to one path at once, or one alone: whole files, the bare model's bytes, no litter."""
    code = """
    def main():
        model = DDP(filled(build()))
        dist.barrier()
        for _ in range(10):
            anycard.save(model, f"{folder}/model.pth")
            anycard.save(model, f"{folder}/whole.pt", whole=True)
            assert_same(anycard.read(f"{folder}/model.pth"), weights(model.module))
        if rank == 0:  # neither call communicates: the other rank does nothing
            anycard.save(model, f"{folder}/alone.pth")
            anycard.save({"model": model, "epoch": 3}, f"{folder}/run.ckpt")
            loaded = anycard.load(f"{folder}/alone.pth", nn.DataParallel(filled(build(), 5)))
            assert_same(weights(loaded.module), weights(model.module))
            anycard.load(f"{folder}/alone.pth", model)
            torch.save(model.state_dict(), f"{folder}/theirs.pth")
            torch.save(model, f"{folder}/theirs_whole.pth")
            torch.save(model.state_dict, f"{folder}/forgotten.pth")
        dist.barrier()
    """
    run_ranks(code, folder)
    ours, theirs = ["alone.pth", "model.pth", "whole.pt"], ["forgotten.pth", "theirs.pth", "theirs_whole.pth"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*ours, *theirs, "run.ckpt"])
    anycard.save(filled(build()), folder / "bare.pth")
    for name in ("alone.pth", "model.pth"):
        assert (folder / name).read_bytes() == (folder / "bare.pth").read_bytes()
    assert_same(weights(torch.load(folder / "whole.pt", weights_only=False)), weights(filled(build())))
    state = anycard.load(folder / "run.ckpt", {"model": (other := filled(build(), 5))})
    assert state["epoch"] == 3
    assert_same(weights(other), weights(filled(build())))
    for name in (*ours, *theirs):
        for target in (build, filled(build(), 5), nn.DataParallel(filled(build(), 5))):
            loaded = anycard.load(folder / name, target)
            assert_same(weights(getattr(loaded, "module", loaded)), weights(filled(build())))


def test_ranks_that_load(folder):
    """Each rank fills its DDP model from any file, ours or plain torch's; the next gradients are in step."""
    source = filled(build())
    anycard.save(source, folder / "ours.pth")
    anycard.save(source, folder / "ours.safetensors")
    anycard.save(source, folder / "whole.pt", whole=True)
    torch.save(source.state_dict(), folder / "plain.pth")
    torch.save(nn.DataParallel(source).state_dict(), folder / "parallel.pth", _use_new_zipfile_serialization=False)
    code = """
    def main():
        for name in sorted(os.listdir(folder)):
            model = DDP(filled(build(), 5))
            anycard.load(f"{folder}/{name}", model)
            assert_same(weights(model.module), weights(filled(build())))
            model(torch.full((4, 64), float(rank))).sum().backward()
            total = model.module[0].weight.grad.double().sum()
            both = [torch.zeros_like(total) for _ in range(world)]
            dist.all_gather(both, total)
            assert torch.equal(both[0], both[1])
        model = DDP(filled(build(), 5))
        before = weights(model.module)
        try:
            anycard.load(f"{folder}/ours.pth", model, rename={"0": "zero"})
        except anycard.MismatchError:
            assert_same(weights(model.module), before)
        else:
            raise AssertionError("not refused")
        loaded = anycard.load(f"{folder}/ours.pth", lambda: DDP(build()))
        assert_same(weights(loaded.module), weights(filled(build())))
        dist.barrier()
    """
    run_ranks(code, folder)


@needs_fork
def test_a_save_killed_half_way_leaves_the_old_file(folder):
    """SIGKILL at several moments of saving 64 MB: the old file is whole, and the next save clears the litter."""
    code = """
    import signal
    from pathlib import Path
    folder = Path(sys.argv[1])
    model = nn.ParameterList([torch.rand(1 << 19) for _ in range(32)])
    for suffix in (".pth", ".safetensors"):
        path = folder / f"large{suffix}"
        anycard.save(model, path)
        before = path.read_bytes()
        interrupted = 0
        for delay in (0.0, 0.02, 0.05):
            child = os.fork()
            if child == 0:
                while True:
                    anycard.save(model, path)
            while len(list(folder.iterdir())) < 2:  # until a temporary file is there
                time.sleep(0.0005)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert path.read_bytes() == before, "the old file was touched"
            interrupted += len(list(folder.iterdir())) > 1
        assert interrupted, "no save was caught in the middle"
        anycard.save(model, path)
        assert [p.name for p in folder.iterdir()] == [path.name], "litter"
        assert path.read_bytes() == before
        assert anycard.verify(path).ok
        path.unlink()
    """
    finish([start(code, folder)])


@needs_fork
def test_readers_beside_a_writer_see_the_old_or_the_new_file(folder):
    """While one process saves two states in turn, every load elsewhere gives one of them, whole."""
    code = """
    path = sys.argv[1]
    anycard.save(filled(build(), 1), path)
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            one, two = weights(filled(build(), 1)), weights(filled(build(), 2))
            try:
                for _ in range(40):
                    for got in (weights(anycard.load(path, build)), anycard.read(path)):
                        assert_same(got, one if torch.equal(got["0.weight"], one["0.weight"]) else two)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
    for turn in range(60):
        anycard.save(filled(build(), 1 + turn % 2), path)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    """
    finish([start(code, folder / "model.pth")])
    assert only_file(folder) == "model.pth"


def test_an_open_checkpoint_outlives_a_new_save(folder):
    """A file that is open for reading is still the old one after another save took its name."""
    path = folder / "model.pth"
    anycard.save(filled(build(), 1), path)
    with anycard.open(path) as ckpt:
        anycard.save(filled(build(), 2), path)
        for name, tensor in weights(filled(build(), 1)).items():
            assert torch.equal(ckpt.torch(name), tensor), name
    assert_same(anycard.read(path), weights(filled(build(), 2)))


def test_a_model_mapped_from_its_own_file_can_be_saved_over_it(folder):
    """torch.load(mmap=True, assign=True), then a save to the same path: the mapped values are written whole."""
    path = folder / "model.pth"
    anycard.save(filled(build()), path)
    model = build()
    model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
    anycard.save(model, path)
    assert_same(anycard.read(path), weights(filled(build())))


def test_threads_load_and_save_at_once(folder):
    """Eight threads of one process save and load different models; none sees another's."""

    def work(seed: int) -> int:
        path, mine = folder / f"{seed % 4}.pth", folder / f"mine{seed}.safetensors"
        for _ in range(3):
            anycard.save(filled(build(), seed % 4), path)
            anycard.save(filled(build(), seed), mine)
            assert_same(weights(anycard.load(path, build)), weights(filled(build(), seed % 4)))
            assert_same(weights(anycard.load(mine, filled(build(), 99))), weights(filled(build(), seed)))
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    assert len(list(folder.iterdir())) == 12


@needs_fork
def test_a_forked_child_saves_and_loads(folder):
    """After the parent saved and loaded, and with a checkpoint open, a forked child does both; so does the parent."""
    code = """
    torch.set_num_threads(1)
    path = f"{sys.argv[1]}/parent.pth"
    anycard.save(filled(build()), path)
    anycard.load(path, build)
    ckpt = anycard.open(path)
    child = os.fork()
    if child == 0:
        try:
            assert_same(weights(anycard.load(path, build)), weights(filled(build())))
            assert torch.equal(ckpt.torch("0.weight"), filled(build())[0].weight)
            anycard.save(filled(build(), 2), f"{sys.argv[1]}/child.pth")
        except BaseException:
            os._exit(1)
        os._exit(0)
    for name in ckpt.tensors:
        assert torch.equal(ckpt.torch(name), filled(build()).state_dict()[name])
    ckpt.close()
    again = f"{sys.argv[1]}/again.pth"
    anycard.save(filled(build(), 3), again)
    assert os.waitpid(child, 0)[1] == 0
    assert_same(anycard.read(f"{sys.argv[1]}/child.pth"), weights(filled(build(), 2)))
    assert_same(anycard.read(again), weights(filled(build(), 3)))
    """
    finish([start(code, folder)])
    assert len(list(folder.iterdir())) == 3


def test_a_process_that_dies_by_an_exception_cleans_up(folder):
    """Ctrl-C and an exception in the middle of a save leave the old file and no litter at all."""

    class Interrupting(nn.Module):
        def __init__(self, error: type[BaseException]) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.error = error

        def __reduce__(self) -> str:
            raise self.error("stop")

    path = folder / "model.pt"
    anycard.save(filled(build()), path)
    before = path.read_bytes()

    def report(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises((error, anycard.CheckpointError)):
            anycard.save(nn.Sequential(Interrupting(error)), path, whole=True)
        assert path.read_bytes() == before
        assert only_file(folder) == "model.pt"
    try:
        anycard.save(filled(build(), 5), path, progress=report)
    except KeyboardInterrupt:
        assert path.read_bytes() == before
    assert only_file(folder) == "model.pt"
