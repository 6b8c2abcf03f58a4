"""Contestants that need no torch: conversion, hashing, and whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from zlib_ng import zlib_ng

import anycard
from speed.checks import Act, Check, NotExactError, fingerprint, same_bytes, same_file, same_value
from speed.floors import CHUNK, hash_all
from speed.subjects import FILES, Subject


@dataclass(frozen=True)
class Process:
    """What a process printed, and the most memory that it held."""

    output: str
    peak_nbytes: int


def copied(subject: Subject, path: Path) -> tuple[Act, Check]:
    """`cp` of the file, then fsync."""
    place = path.with_stem(f"copied-{os.getpid()}")

    def act() -> Path:
        subprocess.run(["cp", path, place], check=True)
        fd = os.open(place, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        return place

    kind = next(kind for kind, name in FILES.items() if name == path.name)
    return act, same_bytes(subject, kind)


def converted(subject: Subject, path: Path, *, suffix: str) -> tuple[Act, Check]:
    """`convert` to the other format."""
    place = path.with_name(f"converted-{os.getpid()}{suffix}")

    def act() -> Path:
        anycard.convert(path, place)
        return place

    return act, same_file(subject)


def bare_crc(subject: Subject, path: Path) -> tuple[Act, Check]:
    """Read and CRC-32, all cores."""

    def check(found: dict[int, int]) -> None:
        data = path.read_bytes()
        if any(zlib_ng.crc32(data[start : start + CHUNK]) != crc for start, crc in found.items()):
            raise NotExactError("a chunk's CRC-32 is wrong")
        same_value(-(-len(data) // CHUNK), "chunks hashed")(len(found))

    return lambda: hash_all(path, zlib_ng.crc32), check


def bare_blake3(subject: Subject, path: Path) -> tuple[Act, Check]:
    """Read and BLAKE3, all cores."""

    def check(found: dict[int, bytes]) -> None:
        data = path.read_bytes()
        if any(blake3(data[start : start + CHUNK]).digest() != digest for start, digest in found.items()):
            raise NotExactError("a chunk's BLAKE3 is wrong")
        same_value(-(-len(data) // CHUNK), "chunks hashed")(len(found))

    return lambda: hash_all(path, lambda part: blake3(part).digest()), check


def verified(subject: Subject, path: Path) -> tuple[Act, Check]:
    """`verify`: every checksum of a torch zip."""
    check = same_value((True, len(subject.tensors)), "whole, and tensors checked")
    return lambda: anycard.verify(path), lambda report: check((report.ok, report.checked))


def fingerprinted(subject: Subject, path: Path) -> tuple[Act, Check]:
    """The fingerprint of the weights."""

    def act() -> str:
        with anycard.open(path) as ckpt:
            return ckpt.fingerprint()

    return act, same_value(fingerprint(subject), "fingerprint")


def shown(subject: Subject, path: Path) -> tuple[Act, Check]:
    """`anycard show FILE`, a whole process."""

    def check(process: Process) -> None:
        if f"{len(subject.tensors):,} tensors" not in process.output:
            raise NotExactError(f"`anycard show` does not say {len(subject.tensors):,} tensors")

    return lambda: _process("-m", "anycard", "show", str(path)), check


def interpreter(subject: Subject, path: Path, *, code: str) -> tuple[Act, Check]:
    """A whole interpreter that runs one line."""
    return lambda: _process("-c", code), lambda process: same_value("", "output")(process.output)


def _process(*arguments: str) -> Process:
    """This process is small, so that the child's peak is its own and not that of the fork."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return Process(output, usage.ru_maxrss * 1024)
