"""Write small checkpoints with an old PyTorch, and the truth about them.

Run by the old PyTorch's own interpreter (Debian 12's packages `python3-torch`
and `python3-torchvision` are 1.13 and 0.14, CPU): `/usr/bin/python3 make.py OUT`.
Each file's tensors are listed in truth.json: path from the top of the object,
dtype, shape, SHA-256 of the row-major little-endian bytes.
"""

import collections
import hashlib
import json
import pickle
import sys
from pathlib import Path

import torch
import torchvision
from torch import nn


class Net(nn.Module):
    """Every kind of state that a small real model has."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.module = nn.Linear(4, 4)  # a real submodule with the unlucky name
        self.norm = nn.utils.weight_norm(nn.Linear(4, 3))
        self.tied_in = nn.Embedding(5, 3)
        self.tied_out = nn.Linear(3, 5, bias=False)
        self.tied_out.weight = self.tied_in.weight
        self.register_buffer("scratch", torch.arange(6.0).view(2, 3), persistent=False)
        self.register_buffer("steps", torch.tensor(7))


def entries(obj, path=""):
    if isinstance(obj, nn.Module):
        yield from entries(obj.state_dict(), path)
    elif isinstance(obj, torch.Tensor):
        yield path, obj
    elif isinstance(obj, dict):
        for key, value in obj.items():
            yield from entries(value, f"{path}.{key}" if path else str(key))
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield from entries(value, f"{path}.{index}" if path else str(index))


def describe(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() and flat.dtype != torch.bool else flat.to(torch.uint8)
    return [str(tensor.dtype)[6:], list(tensor.shape), hashlib.sha256(raw.numpy().tobytes()).hexdigest()]


def main(out):
    torch.manual_seed(20260101)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    net.features(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    parallel = nn.DataParallel(net)
    base = torch.arange(12.0)
    oddities = collections.OrderedDict(
        half=torch.randn(3).half(),
        bf16=torch.randn(3).bfloat16(),
        c64=torch.randn(2, dtype=torch.complex64),
        bool=torch.tensor([True, False]),
        i64=torch.tensor(-3),
        empty=torch.empty(0, 4),
        view=base[2:5],
        strided=base.view(3, 4).t(),
        shared=base,
        parameter=nn.Parameter(torch.ones(2)),
        channels_last=torch.randn(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    )
    training = {"epoch": 3, "model": parallel.state_dict(), "optimizer": optimizer.state_dict(), "best": 0.5}
    shuffle = torchvision.models.shufflenet_v2_x0_5(num_classes=2)
    objects = {
        "weights": net.state_dict(),
        "weights_parallel": parallel.state_dict(),
        "whole": net,
        "whole_parallel": parallel,
        "training": training,
        "oddities": oddities,
        "whole_shuffle_block": shuffle.stage2[0],
        "forgotten_call": net.state_dict,
    }
    truth = {}
    for name, obj in objects.items():
        # A legacy whole model carries the source text of its classes: not kept here.
        whole = name.startswith(("whole", "forgotten"))
        for form, new in (("zip", True),) if whole else (("zip", True), ("legacy", False)):
            path = Path(out, f"{name}.{form}.pth")
            torch.save(obj, path, _use_new_zipfile_serialization=new)
            held = obj.__self__ if name == "forgotten_call" else obj
            truth[path.name] = {key: describe(value) for key, value in entries(held)}
    path = Path(out, "weights.plain.pkl")
    path.write_bytes(pickle.dumps(net.state_dict()))
    truth[path.name] = {key: describe(value) for key, value in entries(net.state_dict())}
    Path(out, "truth.json").write_text(json.dumps({"torch": torch.__version__, "files": truth}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
