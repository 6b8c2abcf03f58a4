"""Contestants that write a model to a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import anycard
from speed.checks import Act, Check, same_bytes, same_file
from speed.floors import write_all
from speed.loading import kind_of
from speed.subjects import Subject


def target(path: Path) -> Path:
    """Where the file is written: beside the subject's own, a place for each process."""
    return path.with_stem(f"written-{os.getpid()}")


def filled(subject: Subject) -> torch.nn.Module:
    """The subject's model with its weights."""
    model = subject.model.factory()()
    model.load_state_dict(torch.load(subject.path("pth"), weights_only=True))
    return model


def fsync(path: Path) -> None:
    """What makes a finished file durable."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def bare(subject: Subject, path: Path) -> tuple[Act, Check]:
    """The file's bytes from memory to the disk."""
    place, data = target(path), memoryview(bytearray(path.read_bytes()))

    def act() -> Path:
        write_all(place, data)
        return place

    return act, same_bytes(subject, kind_of(path))


def torch_save(subject: Subject, path: Path, *, durable: bool) -> tuple[Act, Check]:
    """torch.save of the state dict."""
    place, model = target(path), filled(subject)

    def act() -> Path:
        torch.save(model.state_dict(), place)
        if durable:
            fsync(place)
        return place

    return act, same_file(subject)


def safetensors_save(subject: Subject, path: Path, *, durable: bool) -> tuple[Act, Check]:
    """safetensors' save_file of the state dict."""
    from safetensors.torch import save_file

    place, model = target(path), filled(subject)

    def act() -> Path:
        save_file(model.state_dict(), place)
        if durable:
            fsync(place)
        return place

    return act, same_file(subject)


def anycard_save(subject: Subject, path: Path) -> tuple[Act, Check]:
    """One call; what it leaves is checksummed and durable."""
    place, model = target(path), filled(subject)

    def act() -> Path:
        anycard.save(model, place)
        return place

    return act, same_file(subject)
