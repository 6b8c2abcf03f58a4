"""Real cards: these run where a CUDA card is, and say so where none is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import anycard
from helpers import assert_same, bits, filled, unchanged, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")


class Net(nn.Module):
    """Weights, counters, and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.emb = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in weights(model).items()}


def devices(model: nn.Module) -> set[str]:
    return {str(t.device) for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_from_a_card_is_the_cpus_file(tmp_path, suffix):
    """The bytes do not depend on where the model stood."""
    anycard.save(filled(Net()), tmp_path / f"cpu{suffix}")
    anycard.save(filled(Net()).cuda(), tmp_path / f"card{suffix}")
    assert (tmp_path / f"cpu{suffix}").read_bytes() == (tmp_path / f"card{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_load_onto_a_card(tmp_path, suffix, device):
    """device= puts a built model, an existing one and a meta one on the card, ties and loose buffers included."""
    source = filled(Net())
    path = tmp_path / f"a{suffix}"
    anycard.save(source.cuda(), path)
    want = on_cpu(source)
    for target in (Net, filled(Net(), 5), filled(Net(), 5).cuda()):
        loaded = anycard.load(path, target, device=device)
        assert devices(loaded) == {"cuda:0"}
        assert loaded.head.weight is loaded.emb.weight
        assert_same(on_cpu(loaded), want)
        assert bits(loaded.table) == bits(torch.arange(3.0))
        assert loaded.head(loaded.emb(torch.tensor([1], device="cuda"))).isfinite().all()


def test_an_existing_model_keeps_its_place(tmp_path):
    """Without device= the model stays where it is: on the card, on the CPU, or half and half."""
    source = filled(Net())
    torch.save(source.cuda().state_dict(), tmp_path / "a.pth")
    mixed = filled(Net(), 5)
    mixed.conv.cuda()
    card, cpu = filled(Net(), 5).cuda(), filled(Net(), 5)
    for target, where in ((card, {"cuda:0"}), (cpu, {"cpu"}), (mixed, {"cpu", "cuda:0"})):
        held = [id(p) for p in target.parameters()]
        loaded = anycard.load(tmp_path / "a.pth", target)
        assert devices(loaded) == where
        assert [id(p) for p in loaded.parameters()] == held
        assert_same(on_cpu(loaded), on_cpu(source))
    assert devices(anycard.load(tmp_path / "a.pth", Net)) == {"cpu"}


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_a_model_that_is_there_already_keeps_its_memory(tmp_path, device):
    """However the card is spelt: no second memory, and the values come in place."""
    anycard.save(filled(Net()), tmp_path / "a.pth")
    model = filled(Net(), 5).cuda()
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    anycard.load(tmp_path / "a.pth", model, device=device)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
    assert_same(on_cpu(model), weights(filled(Net())))


def test_a_meta_model_onto_a_card(tmp_path):
    """A model without memory becomes real on the card, the counters that an old file lacks, too."""
    source = filled(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    anycard.load(tmp_path / "old.pth", model, device="cuda")
    assert devices(model) == {"cuda:0"}
    model(torch.rand(4, 2, device="cuda"))


def test_read_gives_cpu_tensors_of_a_card_file(tmp_path):
    """A plain file that says cuda:0 is read on the CPU, weights and whole models."""
    source = filled(Net()).cuda()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    torch.save(nn.DataParallel(source), tmp_path / "whole.pth")
    for name in ("a.pth", "whole.pth"):
        got = anycard.read(tmp_path / name)
        assert {str(t.device) for t in got.values()} == {"cpu"}
        assert_same(got, on_cpu(source))
        with anycard.open(tmp_path / name) as ckpt:
            assert "cuda:0" in {info.device for info in ckpt.tensors.values()}


def test_data_parallel_over_all_cards(tmp_path):
    """DataParallel over real cards: saved bare, loaded into itself and into a bare model, and it runs."""
    parallel = nn.DataParallel(filled(nn.Linear(4, 3)).cuda())
    anycard.save(parallel, tmp_path / "a.pth")
    assert set(anycard.read(tmp_path / "a.pth")) == {"weight", "bias"}
    other = nn.DataParallel(filled(nn.Linear(4, 3), 5).cuda())
    anycard.load(tmp_path / "a.pth", other, device="cuda")
    images = torch.rand(8, 4, device="cuda")
    assert torch.equal(other(images), parallel(images))
    assert_same(on_cpu(anycard.load(tmp_path / "a.pth", nn.Linear(4, 3))), on_cpu(parallel.module))


def test_data_parallel_on_another_device_is_refused(tmp_path):
    """DataParallel whose first card is not the one asked for: DeviceError, and nothing moves."""
    anycard.save(filled(nn.Linear(4, 3)), tmp_path / "a.pth")
    model = nn.DataParallel(filled(nn.Linear(4, 3), 5).cuda())
    with unchanged(model), pytest.raises(anycard.DeviceError, match="DataParallel"):
        anycard.load(tmp_path / "a.pth", model, device="cpu")
    assert devices(model) == {"cuda:0"}


@several
def test_data_parallel_on_another_card_is_refused(tmp_path):
    """The same with two real cards."""
    anycard.save(filled(nn.Linear(4, 3)), tmp_path / "a.pth")
    model = nn.DataParallel(filled(nn.Linear(4, 3), 5).to("cuda:1"), device_ids=[1, 0])
    with unchanged(model), pytest.raises(anycard.DeviceError, match="cuda:1"):
        anycard.load(tmp_path / "a.pth", model, device="cuda:0")
    anycard.load(tmp_path / "a.pth", model, device="cuda:1")
    assert_same(on_cpu(model.module), weights(filled(nn.Linear(4, 3))))


@several
def test_a_model_spread_over_two_cards(tmp_path):
    """Layers on two cards: saved as one file, loaded back in place, each layer where it was."""
    model = nn.Sequential(nn.Linear(2, 2).to("cuda:0"), nn.Linear(2, 2).to("cuda:1"))
    want = on_cpu(filled(model.cpu()))
    model[0].to("cuda:0"), model[1].to("cuda:1")
    anycard.save(model, tmp_path / "a.pth")
    anycard.load(tmp_path / "a.pth", model)
    assert devices(model) == {"cuda:0", "cuda:1"}
    assert_same(on_cpu(model), want)


@several
def test_a_load_and_a_save_take_no_memory_of_another_card(tmp_path):
    """With the model on the second card nothing begins to work on the first, in no thread."""
    anycard.save(filled(nn.Linear(3000, 3000)), tmp_path / "a.pth")
    code = (
        "import sys, torch, anycard\n"
        "model = anycard.load(sys.argv[1], lambda: torch.nn.Linear(3000, 3000), device='cuda:1')\n"
        "anycard.save(model, sys.argv[1])\n"
        "assert not torch._C._cuda_hasPrimaryContext(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pth")], check=True)


def test_a_card_that_is_not_there():
    """One card too many: DeviceError says which are there."""
    absent = f"cuda:{torch.cuda.device_count()}"
    file = io.BytesIO()
    anycard.save(nn.Linear(2, 2), file)
    file.seek(0)
    with pytest.raises(anycard.DeviceError, match="cuda:0"):
        anycard.load(file, lambda: nn.Linear(2, 2), device=absent)


def test_hidden_cards_are_said(tmp_path):
    """With CUDA_VISIBLE_DEVICES empty the error says so; the file of a card loads on the CPU all the same."""
    torch.save(filled(nn.Linear(2, 2)).cuda().state_dict(), tmp_path / "a.pth")
    code = (
        "import sys, torch, anycard\n"
        "build = lambda: torch.nn.Linear(2, 2)\n"
        "anycard.load(sys.argv[1], build)\n"
        "try: anycard.load(sys.argv[1], build, device='cuda')\n"
        "except anycard.DeviceError as error: assert 'CUDA_VISIBLE_DEVICES' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code, str(Path(tmp_path) / "a.pth")], check=True, env=env)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype_and_device_together(tmp_path, dtype):
    """Both asked for at once: floats change, counters stay, all of it on the card."""
    source = filled(Net())
    anycard.save(source, tmp_path / "a.pth")
    loaded = anycard.load(tmp_path / "a.pth", Net, device="cuda", dtype=dtype)
    assert devices(loaded) == {"cuda:0"}
    want = source if dtype == "auto" else source.to(dtype)
    assert_same(on_cpu(loaded), weights(want))


def test_a_load_on_the_card_is_seen_by_what_runs_after(tmp_path):
    """Work that is queued after the load, on a stream of its own too, sees the new values."""
    anycard.save(filled(nn.Linear(256, 256)), tmp_path / "a.pth")
    model = filled(nn.Linear(256, 256), 5).cuda()
    anycard.load(tmp_path / "a.pth", model)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        total = model.weight.detach().double().sum()
    side.synchronize()
    assert torch.isclose(total.cpu(), filled(nn.Linear(256, 256)).weight.detach().double().sum())


def test_a_whole_model_from_a_card(tmp_path):
    """whole=True writes CPU tensors; plain torch without cards, and allow= onto the card, rebuild it."""
    model = nn.DataParallel(filled(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).cuda())
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    theirs = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert devices(theirs) == {"cpu"}
    rebuilt = anycard.load(tmp_path / "whole.pt", device="cuda")
    assert devices(rebuilt) == {"cuda:0"}
    assert_same(on_cpu(rebuilt), on_cpu(model.module))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_transposed_view_with_gaps_on_a_card(tmp_path, suffix):
    """What the copy to the CPU lays out in another order is saved with the right values."""
    model = nn.Module()
    model.register_buffer("x", torch.arange(24.0, device="cuda").view(4, 6)[:, ::2].t())
    anycard.save(model, tmp_path / f"a{suffix}")
    assert_same(anycard.read(tmp_path / f"a{suffix}"), on_cpu(model))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_small_tensors_together_onto_a_card(tmp_path, suffix, dtype):
    """Tensors of several chunks, of one, and thousands of small ones: built on the card, and into what stands there."""
    build = lambda: nn.ModuleDict(  # noqa: E731
        {"large": nn.Linear(3001, 2003), "small": nn.ModuleList(nn.Linear(3, 2) for _ in range(2000))}
    )
    source = filled(build())
    anycard.save(source, tmp_path / f"a{suffix}")
    want = {name: tensor.to(dtype) for name, tensor in weights(source).items()}
    built = anycard.load(tmp_path / f"a{suffix}", build, device="cuda", dtype=dtype)
    there = anycard.load(tmp_path / f"a{suffix}", filled(build(), 5).to("cuda", dtype))
    for model in (built, there):
        assert devices(model) == {"cuda:0"}
        assert_same(on_cpu(model), want)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_large_tensors_of_odd_strides_from_and_to_a_card(tmp_path, suffix):
    """Transposed ones, and views with gaps, of several chunks: saved from the card and filled on it."""
    value = torch.arange(1100 * 2003.0).reshape(1100, 2003)
    for turned in (lambda x: x.t().contiguous().t(), lambda x: x.new_zeros(1100, 2003, 2)[..., 1].copy_(x)):
        model = nn.Module()
        model.register_buffer("x", turned(value.cuda()))
        anycard.save(model, tmp_path / f"a{suffix}")
        assert_same(anycard.read(tmp_path / f"a{suffix}"), {"x": value})
        model.x.zero_()
        anycard.load(tmp_path / f"a{suffix}", model)
        assert_same(on_cpu(model), {"x": value})


def test_a_load_waits_for_what_was_asked_of_the_card_before(tmp_path):
    """Work that is queued on the caller's stream before the load does not overwrite what was loaded."""
    source = filled(nn.Linear(3000, 3000))
    anycard.save(source, tmp_path / "a.pth")
    model = nn.Linear(3000, 3000).cuda()
    other = torch.rand(3000, 3000, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(50):
            model.weight.copy_(other @ other)
        anycard.load(tmp_path / "a.pth", model)
    assert_same(on_cpu(model), weights(source))


@pytest.mark.parametrize("whole", [False, True])
def test_a_save_waits_for_what_was_asked_of_the_card_before(tmp_path, whole):
    """What the caller's stream is still to write is in the file, whichever thread brings it there."""
    model = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(6))).cuda()
    other = torch.rand(2000, 2000, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(50):
            for layer in model:
                layer.weight.copy_(other @ other)
        for layer in model:
            layer.weight.fill_(3.0)
        anycard.save(model, tmp_path / "a.pth", whole=whole)
    assert_same(anycard.read(tmp_path / "a.pth"), on_cpu(model))
