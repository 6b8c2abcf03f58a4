"""Load files with an old PyTorch, by plain `torch.load`, and say what it got.

Run by the old PyTorch's own interpreter: `/usr/bin/python3 load.py FILE…`. Prints JSON: the file's name ->
tensors (path -> dtype, shape, SHA-256 of the row-major little-endian bytes), pairs of names that share memory,
and, of a whole model, what it gives for ones.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch


def entries(obj, path=""):
    if isinstance(obj, torch.nn.Module):
        obj = obj.state_dict()
    if isinstance(obj, torch.Tensor):
        yield path, obj
    elif isinstance(obj, dict):
        for key, value in obj.items():
            yield from entries(value, f"{path}.{key}" if path else str(key))
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield from entries(value, f"{path}.{index}" if path else str(index))


def describe(tensor):
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() and flat.dtype != torch.bool else flat.to(torch.uint8)
    return [str(tensor.dtype)[6:], list(tensor.shape), hashlib.sha256(raw.numpy().tobytes()).hexdigest()]


def report(path):
    held = torch.load(path)
    tensors = dict(entries(held))
    first, tied = {}, []
    for name, tensor in tensors.items():
        if tensor.numel() and first.setdefault(tensor.data_ptr(), name) != name:
            tied.append([first[tensor.data_ptr()], name])
    out = {"tensors": {name: describe(tensor) for name, tensor in tensors.items()}, "tied": tied}
    if isinstance(held, torch.nn.Module):
        with torch.no_grad():
            out["forward"] = held.eval()(torch.ones(2, 3, 8, 8)).flatten().tolist()
            out["module"] = type(held).__name__
    return out


if __name__ == "__main__":
    json.dump({Path(path).name: report(path) for path in sys.argv[1:]}, sys.stdout)
