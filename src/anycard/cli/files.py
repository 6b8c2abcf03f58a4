"""show, convert, diff, fingerprint, verify: the verbs that need no torch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from anycard.checkpoint import Checkpoint, open_checkpoint
from anycard.cli.output import as_json, clean, table
from anycard.tensors import TensorInfo

_JSON = click.option("--json", "json_", is_flag=True, help="Print data for programs.")
_KEY = click.option("--key", help="Which state dict in the file.")


@click.command()
@click.argument("file")
@click.option("--tree", is_flag=True, help="Print the objects in the file as a tree.")
@click.option("--names", is_flag=True, help="Print canonical names only, one a line.")
@_KEY
@_JSON
def show(file: str, tree: bool, names: bool, key: str | None, json_: bool) -> None:
    """What is in FILE: format, wrappers, tensors. Reads the index only."""
    with open_checkpoint(file) as ckpt:
        tensors = ckpt.tensors if key is None else ckpt.weights(key)
        if json_:
            as_json(_described(ckpt, tensors))
        elif names:
            for name in tensors if len(ckpt.state_dicts) != 1 and key is None else ckpt.weights(key):
                click.echo(clean(name))
        elif tree:
            _tree(ckpt)
        else:
            _summary(ckpt, tensors)


def _described(ckpt: Checkpoint, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    rows = {
        name: {"dtype": i.dtype, "shape": list(i.shape), "device": i.device, "nbytes": i.nbytes, "offset": i.offset}
        for name, i in tensors.items()
    }
    return {
        "path": ckpt.path, "format": ckpt.format, "wrappers": list(ckpt.wrappers), "metadata": ckpt.metadata,
        "state_dicts": [found.key for found in ckpt.state_dicts], "tensors": rows, "objects": ckpt.objects,
    }  # fmt: skip


def _summary(ckpt: Checkpoint, tensors: dict[str, TensorInfo]) -> None:
    total = sum(info.nbytes for info in tensors.values())
    devices = sorted({info.device for info in tensors.values()})
    click.echo(clean(f"{ckpt.path}: {ckpt.format}, {len(tensors)} tensors, {total / 1e6:,.1f} MB, tagged {devices}"))
    if ckpt.wrappers:
        click.echo(f"wrapper segments in the names, dropped on load: {', '.join(ckpt.wrappers)}")
    rows = [("tensor", "shape", "dtype", "MB")]
    for name, info in tensors.items():
        rows.append((name, " x ".join(map(str, info.shape)) or "scalar", info.dtype, f"{info.nbytes / 1e6:,.3f}"))
    table(rows, right=(3,))
    beside = [name for name in ckpt.objects if name]
    if beside:
        click.echo(clean(f"beside the tensors: {', '.join(beside[:20])}{' …' if len(beside) > 20 else ''}"))


def _tree(ckpt: Checkpoint) -> None:
    seen: set[str] = set()
    leaves = {**{n: repr(i) for n, i in ckpt.tensors.items()}, **{n: str(v)[:100] for n, v in ckpt.objects.items()}}
    for path, text in leaves.items():
        parts = path.split(".")
        for depth in range(len(parts) - 1):
            head = ".".join(parts[: depth + 1])
            if head not in seen:
                seen.add(head)
                click.echo(clean("  " * depth + parts[depth]))
        click.echo(clean("  " * (len(parts) - 1) + f"{parts[-1]}: {text}"))


@click.command()
@click.argument("src")
@click.argument("dst")
@_KEY
@_JSON
def convert(src: str, dst: str, key: str | None, json_: bool) -> None:
    """Write SRC in the format of DST's suffix, under canonical names."""
    from anycard.operations.conversion import convert as run

    done = run(src, dst, key=key, progress=True)
    if json_:
        as_json(asdict(done))
        return
    click.echo(clean(f"{done.dst}: {done.format}, {done.tensors} tensors"))
    if done.wrappers:
        click.echo(f"dropped from the names: {', '.join(done.wrappers)}", err=True)
    if done.left_behind:
        click.echo(clean(f"left behind: {', '.join(done.left_behind[:20])}"), err=True)


@click.command()
@click.argument("a")
@click.argument("b")
@_KEY
@_JSON
def diff(a: str, b: str, key: str | None, json_: bool) -> None:
    """Compare the weights of A and B: names, shapes, dtypes, values. Exit 1 where they differ."""
    from anycard.operations.comparison import diff as run

    found = run(a, b, key=key)
    if json_:
        as_json({**asdict(found), "equal": found.equal})
    else:
        click.echo("same weights" if found.equal else "different", nl=False)
        click.echo(f": {found.same} tensors are the same bit for bit")
        lines = [("only in A", n, "") for n in found.only_a] + [("only in B", n, "") for n in found.only_b]
        lines += [("shape", n, f"{x} / {y}") for n, (x, y) in found.shapes.items()]
        lines += [("dtype", n, f"{x} / {y}") for n, (x, y) in found.dtypes.items()]
        lines += [("values", n, "") for n in found.values]
        table(lines)
    sys.exit(0 if found.equal else 1)


@click.command()
@click.argument("file")
@_KEY
@_JSON
def fingerprint(file: str, key: str | None, json_: bool) -> None:
    """The hash of FILE's weights: the same in any format, any wrapper."""
    from anycard.operations.fingerprinting import fingerprint as run

    value = run(file, key=key)
    as_json({"path": file, "fingerprint": value}) if json_ else click.echo(value)


@click.command()
@click.argument("file")
@_JSON
def verify(file: str, json_: bool) -> None:
    """Check every checksum in FILE. Exit 1 where something is damaged."""
    from anycard.operations.verification import verify as run

    report = run(file)
    if json_:
        as_json({**asdict(report), "ok": report.ok})
    else:
        unchecked = f", {len(report.unchecked)} carry no checksum" if report.unchecked else ""
        click.echo(f"{'whole' if report.ok else 'damaged'}: {report.checked} tensors checked{unchecked}")
        for name in report.damaged:
            click.echo(clean(f"damaged  {name}"))
    sys.exit(0 if report.ok else 1)
