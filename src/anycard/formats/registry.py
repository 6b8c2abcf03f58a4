"""Which format a file is, told by its content. A new format is a file here and a line in a table below.

Archives of torch's of other kinds are told in `torch_zip`, what folders hold in `folders`.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from anycard.disk.folder import Folder, home_of
from anycard.disk.source import Source
from anycard.errors import ChoiceError, FormatError
from anycard.formats.index import Index
from anycard.limits import DEFAULT, Limits

# Suffixes when writing, and the format that they mean.
SUFFIXES = {
    ".safetensors": "safetensors",
    **dict.fromkeys((".pt", ".pth", ".pkl", ".bin", ".ckpt", ".pth.tar"), "torch zip"),
}


# torch's magic number, the first pickle of a legacy stream: by LONG1, maybe behind a frame, or in protocol 0 and 1.
LEGACY = re.compile(
    rb"(\x80.)?(\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\.|L119547037146038801333356L\n\.", re.DOTALL
)
# How files of a format begin, and its module, which has `read_index(source, limits)`.
FORMATS = (
    (re.compile(rb"PK(\x03\x04|\x05\x06|\x06\x06)"), "anycard.formats.torch_zip"),
    (LEGACY, "anycard.formats.legacy"),
)
_SAFETENSORS = "anycard.formats.safetensors"  # eight bytes of a number, then JSON
_TAR = "anycard.formats.legacy_tar"  # a tar, told by its members
# Told only once it is known to be neither: a pickle's first opcode, or a compressed stream's signature.
_PICKLE = re.compile(
    rb"\x80[\0-\5]|[(\]})c]|\x1f\x8b|\x78[\x01\x5e\x9c\xda]|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|\x5d\0", re.DOTALL
)
_HOLDERS = "anycard.formats.holders"  # files that hold checkpoints
# A file of a checkpoint that is several files, told by its name: it leads to its folder.
_PARTS = (
    # Of a variant too: model.safetensors.index.fp16.json.
    (re.compile(r"\.index\.json$|\.(safetensors|bin)\.index\.[^./\\]+\.json$"), "anycard.formats.shards"),
    (re.compile(r"\.metadata$|\.distcp$"), "anycard.formats.dcp"),
)
_KNOWN = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not fetched. Run `git lfs pull`."),
    (b"<!doctype html", "a web page, not a checkpoint: the download gave a page instead of the file."),
    (b"<html", "a web page, not a checkpoint: the download gave a page instead of the file."),
    (b"<?xml", "an XML document, not a checkpoint: the download gave an error instead of the file."),
    (b"\x89HDF", "an HDF5 file (Keras or PyTables), not a PyTorch checkpoint."),
    (b"GGUF", "a GGUF file (llama.cpp), not a PyTorch checkpoint."),
)  # fmt: skip


def read_index(source: Source, limits: Limits = DEFAULT, member: str | None = None, depth: int = 0) -> Index:
    """The checked index of a file or a folder, in whatever format it is.

    Args:
        member: Which checkpoint, where several are inside.
        depth: How many files the source lies in.

    Raises:
        FormatError: Empty, damaged, or no checkpoint; with the byte offset where one is meant.
        ChoiceError: Several checkpoints are inside, or none of the name `member`.
    """
    if isinstance(source, Folder):
        return _read("anycard.formats.folders", source, limits, member)
    part = None if member is not None else _part(source)
    if part is not None:
        return _read_part(part, source, limits)
    head = source.read(0, min(source.size, 512))
    held = None if _is_plain(head) else importlib.import_module(_HOLDERS).read_held(source, limits, member, depth)
    if held is not None:
        index: Index = held
        return index
    if member is not None:
        message = f"{source.name} is one checkpoint, not a file that holds others: member= picks nothing in it"
        raise ChoiceError(message, path=source.name)
    return read_file_index(source, limits)


def read_file_index(source: Source, limits: Limits = DEFAULT) -> Index:
    """The checked index of a checkpoint that is a single file."""
    head = source.read(0, min(source.size, 1024))
    if not head:
        raise FormatError("the file is empty (0 bytes), or the open file stands at its end", path=source.name, offset=0)
    if module := _told_by(head):
        return _read(module, source, limits)
    if importlib.import_module(_TAR).is_legacy_tar(source, limits):
        return _read(_TAR, source, limits)
    if _PICKLE.match(head):
        return _read("anycard.formats.plain_pickle", source, limits)
    raise FormatError(_explain(head), path=source.name, offset=0)


def is_checkpoint(head: bytes) -> bool:
    """A file that begins so is a checkpoint by its magic number; or a zip, which may be anything."""
    return bool(_told_by(head)) and len(head) > 8


def _is_plain(head: bytes) -> bool:
    """The common case: no file that could hold others, but a torch zip, or a checkpoint of another magic number."""
    if head.startswith(b"PK"):
        return begins_torch_zip(head)
    return is_checkpoint(head)


def begins_torch_zip(head: bytes) -> bool:
    """A zip whose first record is a torch zip's pickle, at its top or in one folder, in whatever case."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    return re.fullmatch(rb"([^/]+/)?data\.pkl", name, re.IGNORECASE | re.DOTALL) is not None


def _told_by(head: bytes) -> str:
    """The module of the format that the first bytes tell, or ""."""
    module = next((module for begins, module in FORMATS if begins.match(head)), "")
    return module or (_SAFETENSORS if _like_safetensors(head) else "")


def _part(source: Source) -> Any:
    """The module of the format whose folder the file is a part of, or None."""
    module = next((module for name, module in _PARTS if name.search(source.name)), None)
    found = None if module is None else importlib.import_module(module)
    return found if found is not None and found.is_part(source) else None


def _read_part(module: Any, source: Source, limits: Limits) -> Index:
    """The index of what the file's folder holds."""
    folder = home_of(source)
    if folder is None:
        raise FormatError("this file needs those in its folder: give its path, not an open file", path=source.name)
    try:
        index: Index = module.read_part(folder, source, limits)
    except BaseException:
        folder.close()
        raise
    return index


def _read(module: str, source: Source, limits: Limits, *member: str | None) -> Index:
    try:
        index: Index = importlib.import_module(module).read_index(source, limits, *member)
    except FormatError as error:
        error.path = error.path or source.name
        raise
    return index


def _like_safetensors(head: bytes) -> bool:
    """Eight bytes of length, then JSON; also where the file is cut short within them."""
    if _is_cut_header(head):
        return True
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def _is_cut_header(head: bytes) -> bool:
    """Shorter than a header's length field, and all but its low bytes zero."""
    return len(head) < 9 and len(head) > 3 and head[4:] == b"\0" * len(head[4:])


def _explain(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, text in _KNOWN:
        if start.startswith(signature.lower()):
            return f"the file is {text}"
    return f"the file is no checkpoint that anycard knows; it begins with {head[:12]!r}"


def format_for(path: str) -> str:
    """The format that a path's suffix asks for when writing.

    Raises:
        ValueError: No suffix, or an unknown one.
    """
    lower = path.lower()
    for suffix, name in SUFFIXES.items():
        if lower.endswith(suffix) and len(lower.replace("\\", "/").rsplit("/", 1)[-1]) > len(suffix):
            return name
    raise ValueError(
        f"{path}: the suffix says the format when writing; use one of {', '.join(SUFFIXES)} "
        "(folders and other suffixes are not written)"
    )
