"""show: what is in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from anycard.checkpoint import Checkpoint, open_checkpoint
from anycard.cli.options import AS_JSON, KEY, MEMBER
from anycard.cli.output import clean, count, print_json, size, summed_up, table
from anycard.tensors import TensorInfo


@click.command("show")
@click.argument("file")
@click.option("--tree", is_flag=True, help="Print the objects as a tree; a whole model as print(model) would.")
@click.option("--names", is_flag=True, help="Print names only: canonical ones, or full paths of several state dicts.")
@KEY
@MEMBER
@AS_JSON
def command(file: str, tree: bool, names: bool, key: str | None, member: str | None, as_json: bool) -> None:
    """What is in FILE: format, wrappers, tensors. Reads the index only, whatever the size."""
    with open_checkpoint(file, member=member) as ckpt:
        if as_json:
            print_json(_described(ckpt, key))
        elif names:
            _names(ckpt, key)
        elif tree:
            _tree(ckpt, key)
        else:
            _summary(ckpt, ckpt.tensors if key is None else ckpt.weights(key))


def _described(ckpt: Checkpoint, key: str | None) -> dict[str, Any]:
    tensors = ckpt.tensors if key is None else ckpt.weights(key)
    rows = {
        name: {
            "dtype": i.dtype,
            "shape": list(i.shape),
            "device": i.device,
            "nbytes": i.nbytes,
            "offset": i.offset,
            "file": i.file,
        }
        for name, i in tensors.items()
    }
    return {
        "path": ckpt.path, "format": ckpt.format, "wrappers": list(ckpt.wrappers), "metadata": ckpt.metadata,
        "state_dicts": [found.key for found in ckpt.state_dicts], "tensors": rows, "objects": ckpt.objects,
    }  # fmt: skip


def _names(ckpt: Checkpoint, key: str | None) -> None:
    one = key is not None or len(ckpt.state_dicts) == 1
    for name in ckpt.weights(key) if one else ckpt.tensors:
        click.echo(clean(name, line=True))


def _tree(ckpt: Checkpoint, key: str | None) -> None:
    from anycard.names.module_tree import tree_lines

    found = None if key is None else ckpt.chosen(key)
    for line in tree_lines(ckpt.tree if found is None else found.tensors if found.held is None else found.held):
        click.echo(clean(line, line=True))


def _summary(ckpt: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    total = size(sum(info.nbytes for info in tensors.values()))
    tags = ", ".join(sorted({info.device for info in tensors.values()}))
    head = f"{ckpt.path}: {ckpt.format}, {count(len(tensors), 'tensor')}, {total}"
    click.echo(clean(f"{head}, tagged {tags}" if tags else head))
    if ckpt.wrappers:
        click.echo(f"wrappers in the names, dropped on load: {', '.join(map(clean, ckpt.wrappers))}")
    keys = [found.key for found in ckpt.state_dicts]
    if len(keys) > 1:
        click.echo(clean(f"state dicts, to pick with --key: {', '.join(keys)}"))
    rows = [
        (name or "(the tensor itself)", info.dtype, " x ".join(map(str, info.shape)) or "scalar", size(info.nbytes))
        for name, info in tensors.items()
    ]
    if rows:
        table([("tensor", "dtype", "shape", "size"), *rows], right=(3,))
    beside = [name for name in ckpt.objects if name]
    if beside:
        click.echo(f"beside the tensors: {summed_up(beside)}")
