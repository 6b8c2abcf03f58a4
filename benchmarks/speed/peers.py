"""Other libraries that bring a file into an existing model, each by its shortest call."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from speed.checks import Act, Check, same_module
from speed.loading import copy_by_name, existing
from speed.subjects import Subject


def safetensors_load_model(subject: Subject, path: Path) -> tuple[Act, Check]:
    """safetensors' own call for a module."""
    from safetensors.torch import load_model

    model = existing(subject)

    def act() -> nn.Module:
        load_model(model, path)
        return model

    return act, same_module(subject)


def safetensors_copy(subject: Subject, path: Path) -> tuple[Act, Check]:
    """safetensors' tensors, copied by name."""
    from safetensors.torch import load_file

    model = existing(subject)

    def act() -> nn.Module:
        copy_by_name(model, load_file(path))
        return model

    return act, same_module(subject)


def fastsafetensors(subject: Subject, path: Path) -> tuple[Act, Check]:
    """fastsafetensors on the CPU, copied by name."""
    from fastsafetensors import fastsafe_open

    model = existing(subject)

    def act() -> nn.Module:
        own = model.state_dict()
        with fastsafe_open(filenames=[str(path)], nogds=True, device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                own[name].copy_(file.get_tensor(name))
        return model

    return act, same_module(subject)


def runai(subject: Subject, path: Path) -> tuple[Act, Check]:
    """runai-model-streamer, copied by name as tensors arrive."""
    from runai_model_streamer import SafetensorsStreamer

    model = existing(subject)

    def act() -> nn.Module:
        own = model.state_dict()
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path))
            for name, tensor in streamer.get_tensors():
                own[name].copy_(tensor)
        return model

    return act, same_module(subject)


def tensorizer(subject: Subject, path: Path) -> tuple[Act, Check]:
    """tensorizer, from a file of its own format."""
    from tensorizer import TensorDeserializer

    model = existing(subject)

    def act() -> nn.Module:
        with torch.no_grad(), TensorDeserializer(str(path), device="cpu") as file:
            file.load_into_module(model)
        return model

    return act, same_module(subject)
