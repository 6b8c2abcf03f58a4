"""Try every verb on a file of every format, and compare what comes out with what went in.

    python tests/format_table.py            # prints the table
    python tests/format_table.py --write    # and puts it into docs/formats/README.md

A cell is good only where names, dtypes, shapes and bytes are those that were written; else it says what happened.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import joblib
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table
from safetensors.torch import save, save_file
from torch import nn

import anycard
from anycard.cli.main import cli
from helpers import assert_same, filled, weights
from test_folders_zero import HALF, MIXED, zero_folder
from test_folders_zero import Net as ZeroNet

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats" / "README.md"
START, END = "<!-- what tests/format_table.py printed -->\n", "<!-- end -->\n"


class Net(nn.Module):
    """A model of a few tensors, all float32, as the oldest formats have them; odd widths for shards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 30)
        self.second = nn.Linear(30, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


MODEL = filled(Net())
WANT = OrderedDict(weights(MODEL))
Make = Callable[[Path], Path]


class Row(NamedTuple):
    """A format: its page in docs/formats, and what makes a file (or folder) of it in a folder to work in.

    `want` is what was written; `classes` are those that a whole model's pickle names, which scan calls unknown.
    """

    name: str
    page: str
    make: Make
    want: dict[str, torch.Tensor] = WANT
    classes: tuple[str, ...] = ()
    model: Callable[[], nn.Module] = Net


def torch_saved(value: Any, **options: Any) -> bytes:
    """A torch file in memory."""
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def written(work: Path, name: str, data: bytes) -> Path:
    """A file of these bytes."""
    (work / name).write_bytes(data)
    return work / name


def legacy_tar(work: Path) -> Path:
    from test_formats_tar import tar

    return written(work, "old.pt", tar(WANT, list(WANT.values())))


def joblibbed(work: Path, compress: int) -> Path:
    joblib.dump({name: tensor.numpy() for name, tensor in WANT.items()}, work / "m.joblib", compress=compress)
    return work / "m.joblib"


def torchscript(work: Path) -> Path:
    torch.jit.save(torch.jit.script(MODEL), work / "script.pt")
    return work / "script.pt"


def package(work: Path) -> Path:
    with torch.package.PackageExporter(work / "package.pt") as exporter:
        exporter.extern("torch.**")
        exporter.save_text("notes", "readme.txt", "a text")
        exporter.save_pickle("model", "model.pkl", WANT)
    return work / "package.pt"


def exported(work: Path) -> Path:
    torch.export.save(torch.export.export(MODEL, (torch.ones(2, 40),)), work / "program.pt2")
    return work / "program.pt2"


def safetensors(work: Path) -> Path:
    save_file(WANT, work / "m.safetensors")
    return work / "m.safetensors"


def sharded(work: Path, safe: bool, index: bool = True) -> Path:
    from test_folders_shards import sharded as shards

    path = shards(work / "model", WANT, safe)
    if not index:
        path.unlink()
    return path.parent


def distributed(work: Path, **options: Any) -> Path:
    dcp.save(dict(WANT), no_dist=True, **(options or {"checkpoint_id": work / "dcp"}))
    return work / "dcp"


def dcp_safetensors(work: Path) -> Path:
    return distributed(work, storage_writer=dcp.HuggingFaceStorageWriter(str(work / "dcp")))


def held(work: Path, kind: str) -> Path:
    from test_folders_members import HOLDERS

    return HOLDERS[kind](work / kind, {"notes.txt": b"x", "net.pt": torch_saved(WANT)})


def archived(work: Path, kind: str, folder: Path) -> Path:
    from test_archived_sets import files_of
    from test_folders_members import HOLDERS

    return HOLDERS[kind](work / kind, files_of(folder, "model/"))


def unpacked(work: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(torch_saved(WANT))) as archive:
        archive.extractall(work)
    return work / "archive"


def zero(work: Path, stage: int) -> Path:
    return zero_folder(work / "run", stage)


ROWS = (
    Row("torch zip", "torch-zip", lambda w: written(w, "m.pth", torch_saved(WANT))),
    Row("torch zip of a whole model", "torch-zip", lambda w: written(w, "m.pth", torch_saved(MODEL)),
        classes=(f"{Net.__module__}.Net", "torch.nn.modules.linear.Linear")),
    Row("legacy stream", "legacy-stream",
        lambda w: written(w, "m.pt", torch_saved(WANT, _use_new_zipfile_serialization=False))),
    Row("legacy tar", "legacy-tar", legacy_tar),
    Row("plain pickle", "plain-pickle", lambda w: written(w, "m.pkl", pickle.dumps(WANT))),
    Row("plain pickle, gzip", "plain-pickle", lambda w: written(w, "m.pkl.gz", gzip.compress(pickle.dumps(WANT)))),
    Row("cloudpickle", "plain-pickle", lambda w: written(w, "m.pkl", cloudpickle.dumps(WANT))),
    Row("joblib", "plain-pickle", lambda w: joblibbed(w, 0)),
    Row("joblib, compressed", "plain-pickle", lambda w: joblibbed(w, 3)),
    Row("TorchScript", "torchscript", torchscript),
    Row("torch package", "torch-package", package),
    Row("torch export (.pt2)", "torch-export", exported),
    Row("safetensors", "safetensors", safetensors),
    Row("sharded safetensors, index", "sharded", lambda w: sharded(w, True)),
    Row("sharded safetensors, no index", "sharded", lambda w: sharded(w, True, index=False)),
    Row("sharded torch, index", "sharded", lambda w: sharded(w, False)),
    Row("DCP", "dcp", distributed),
    Row("DCP of safetensors", "dcp", dcp_safetensors),
    Row("zip of checkpoints", "holders", lambda w: held(w, "stored.zip")),
    Row("tar of checkpoints (.nemo)", "holders", lambda w: held(w, "pax.nemo")),
    Row("zip of shards", "holders", lambda w: archived(w, "stored.zip", sharded(w, True))),
    Row("tar of a DCP folder", "holders", lambda w: archived(w, "gz.nemo", distributed(w))),
    Row("torch file, gzip", "holders", lambda w: written(w, "m.pth.gz", gzip.compress(torch_saved(WANT)))),
    Row("unpacked torch zip", "holders", unpacked),
    Row("DeepSpeed ZeRO-2 folder", "zero", lambda w: zero(w, 2), HALF, model=ZeroNet),
    Row("DeepSpeed ZeRO-3 folder", "zero", lambda w: zero(w, 3), MIXED, model=ZeroNet),
)  # fmt: skip


def _list(row: Row, path: Path, work: Path) -> None:
    with anycard.open(path) as ckpt:
        got = {name: (info.dtype, info.shape) for name, info in ckpt.weights().items()}
    assert got == {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in row.want.items()}


def _read(row: Row, path: Path, work: Path) -> None:
    assert_same(anycard.read(path), row.want)


def _load(row: Row, path: Path, work: Path) -> None:
    model = filled(row.model(), 1)
    anycard.load(path, model, dtype="auto")
    assert_same(weights(model), row.want)


def _convert(row: Row, path: Path, work: Path) -> None:
    for name in ("to.safetensors", "to.pth"):
        anycard.convert(path, work / name)
        assert_same(anycard.read(work / name), row.want)


def _verify(row: Row, path: Path, work: Path) -> None:
    _ask("verify", path)


def _fingerprint(row: Row, path: Path, work: Path) -> None:
    reference = written(work, "same.safetensors", save(dict(row.want)))
    assert _ask("fingerprint", path).split()[0] == _ask("fingerprint", reference).split()[0]


def _diff(row: Row, path: Path, work: Path) -> None:
    _ask("diff", path, written(work, "same.safetensors", save(dict(row.want))))


def _show(row: Row, path: Path, work: Path) -> None:
    shown = _ask("show", path)
    assert all(name in shown for name in row.want)


def _scan(row: Row, path: Path, work: Path) -> str:
    report = anycard.scan(path)
    assert not report.unreadable, report.unreadable
    bad = sorted({finding.name for finding in report.bad})
    assert bad == sorted(row.classes), f"not clean: {', '.join(bad)}"
    return "yes" if report.clean else "names the classes"


def _ask(verb: str, *paths: Path) -> str:
    result = CliRunner().invoke(cli, [verb, *map(str, paths)])
    assert result.exit_code == 0, f"exit {result.exit_code}: {' '.join(result.output.split())[:300]}"
    return result.output


VERBS: dict[str, Callable[[Row, Path, Path], str | None]] = {
    "list": _list, "show": _show, "read": _read, "load": _load, "convert": _convert, "diff": _diff,
    "fingerprint": _fingerprint, "verify": _verify, "scan": _scan,
}  # fmt: skip


GOOD = ("yes", "names the classes")


def tried(row: Row) -> dict[str, str]:
    """Verb -> "yes" or what is right here, or what happened."""
    cells = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        work = Path(folder)
        path = row.make(work)
        for verb, attempt in VERBS.items():
            inside = work / f"try {verb}"
            inside.mkdir()
            try:
                cells[verb] = attempt(row, path, inside) or "yes"
            except Exception as error:  # noqa: BLE001 - whatever happened is the answer
                cells[verb] = f"{type(error).__name__}: {error}".replace(str(work), "…")[:200]
    return cells


def as_markdown(rows: dict[str, dict[str, str]]) -> str:
    """The table, what happened elsewhere as notes below it."""
    notes: list[str] = []
    lines = ["| format | " + " | ".join(VERBS) + " |", "| --- |" + " :-: |" * len(VERBS)]
    for row in ROWS:
        cells = []
        for said in rows[row.name].values():
            if said not in GOOD and said not in notes:
                notes.append(said)
            cells.append(f"({notes.index(said) + 1})" if said in notes else said.replace("yes", "✓"))
        lines.append(f"| [{row.name}]({row.page}.md) | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({number}) {note}\n" for number, note in enumerate(notes, 1))])


def main() -> int:
    """Print the table; exit 1 where a cell is not good."""
    rows = {row.name: tried(row) for row in ROWS}
    table = Table()
    for column in ("format", *VERBS):
        table.add_column(column)
    for name, cells in rows.items():
        table.add_row(name, *(said if said in GOOD else f"[red]{said}" for said in cells.values()))
    Console(width=140).print(table)
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + "\n" + as_markdown(rows) + "\n" + END + rest.partition(END)[2])
    return 0 if all(said in GOOD for cells in rows.values() for said in cells.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
