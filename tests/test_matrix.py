"""The matrix: its rows, its verdicts, its tables, and that it runs for real on a tiny model."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from anycard.cli.matrix import command
from anycard.matrix import bits, rows, run_matrix, tables
from anycard.matrix.recipes import RECIPES
from anycard.matrix.results import EXACT, NOTHING, OURS, PLAIN, Cell, MatrixReport, Outcome, failed, merged

TINY = """
    import os
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.norm = torch.nn.BatchNorm1d(2)
            self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
            self.register_buffer("index", torch.arange(4))
            self.scale = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    class Deadly(Tiny):  # kills the first process that rebuilds it
        def __setstate__(self, state):
            if not os.path.exists("died"):
                open("died", "w").close()
                os._exit(3)
            super().__setstate__(state)

    def frozen():
        return Tiny().requires_grad_(False)

    def hostile():
        print("models may print")
        raise RuntimeError("\\x1b[31mred\\nsecond line")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the module `tinymodels`, and a place for temporary files beside it."""
    (tmp_path / "tinymodels.py").write_text(textwrap.dedent(TINY))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pick(**wanted: str) -> list[rows.Row]:
    return [row for row in rows.all_rows() if all(getattr(row, k) == v for k, v in wanted.items())]


def verdicts(report: MatrixReport, loader: str, column: str) -> set[str]:
    cells = (cell for cell in report.cells if (cell.loader, cell.column) == (loader, column))
    return {cell.outcome.verdict for cell in cells}


def test_every_row_of_the_issue_is_there() -> None:
    """Four ways to stand x weights and whole x every suffix x every writer; absent card; bare method."""
    table = rows.all_rows()
    zips = {(w, by, s) for w in ("weights", "whole") for by in ("torch", "anycard") for s in rows.TORCH_SUFFIXES}
    library = {("weights", "safetensors", ".safetensors"), ("weights", "anycard", ".safetensors")}
    for saved_from in (rows.SINGLE, rows.DATA_PARALLEL, rows.DDP, rows.COMPILED):
        mine = {(row.what, row.writer, row.suffix) for row in table if row.saved_from == saved_from}
        assert mine == zips | library
    assert [row.what for row in table if row.saved_from == rows.ABSENT_CARD] == ["weights", "whole"]
    assert {row.plain for row in table if row.what == "method"} == {rows.METHOD, rows.ASSIGNED}


def test_every_line_that_a_table_prints_has_a_function() -> None:
    """A recipe's words are the key to what runs."""
    assert {line for row in rows.all_rows() for line in (row.plain, row.ours)} == set(RECIPES)


def test_plain_pytorch_gets_its_known_verdicts_and_we_are_exact(here: Path) -> None:
    """Real files, real gloo processes, every tensor's bits: what people meet, and what we make of it."""
    chosen = [*pick(suffix=".pkl"), *pick(suffix=".safetensors"), *pick(saved_from=rows.ABSENT_CARD)]
    chosen += pick(what="method")

    report = run_matrix("tinymodels:Tiny", rows=chosen)

    ours = {(cell.row.label, cell.column, cell.outcome.verdict) for cell in report.cells if cell.loader == OURS}
    assert {verdict for *_, verdict in ours} == {EXACT}, sorted(ours)
    assert report.ok
    assert report.count(OURS)[:2] == (len(chosen) * 2, len(chosen) * 2)
    assert list((here / "tmp").iterdir()) == []

    def plain(column: str, **wanted: str) -> set[str]:
        some = {row for row in chosen if all(getattr(row, k) == v for k, v in wanted.items())}
        mine = (c for c in report.cells if c.loader == PLAIN and c.column == column and c.row in some)
        return {cell.outcome.verdict for cell in mine}

    names = "RuntimeError: Error(s) in loading state_dict for"
    assert plain("single", saved_from=rows.SINGLE) == {EXACT}
    assert plain("several", saved_from=rows.SINGLE, what="weights") == {f"{names} DistributedDataParallel:"}
    assert plain("single", saved_from=rows.DDP, what="weights", writer="torch") == {f"{names} Tiny:"}
    assert plain("several", saved_from=rows.DDP, what="weights", writer="torch") == {EXACT}
    assert plain("single", what="whole", saved_from=rows.DATA_PARALLEL, writer="torch") == {"names carry module."}
    assert plain("single", what="whole", writer="anycard") == {EXACT}
    assert plain("several", what="whole", saved_from=rows.COMPILED, writer="torch") == {"names carry _orig_mod."}
    assert "CUDA device" in plain("single", saved_from=rows.ABSENT_CARD).pop()
    assert plain("several", plain=rows.ASSIGNED) == {NOTHING}
    assert "dict-like" in plain("single", plain=rows.METHOD).pop()


def test_a_process_that_dies_is_a_verdict_and_the_next_cell_runs(here: Path) -> None:
    """A dead worker costs its cell, not the run."""
    chosen = pick(saved_from=rows.SINGLE, what="whole", writer="torch", suffix=".pt")

    report = run_matrix("tinymodels:Deadly", rows=chosen)

    dead, *others = (cell.outcome.verdict for cell in report.cells)
    assert dead == "WorkerLostError: the worker process died: exit code 3"
    assert others == [EXACT] * 3
    assert report.ok
    assert report.count(PLAIN)[:2] == (1, 2)


def test_a_model_that_ddp_refuses_has_the_refusal_in_its_cells(here: Path) -> None:
    """Without parameters to train there is no DDP to load into; single cards go on."""
    report = run_matrix("tinymodels:frozen", rows=pick(saved_from=rows.SINGLE, writer="torch", suffix=".pth"))

    assert verdicts(report, OURS, "single") == {EXACT}
    assert all("requires a gradient" in verdict for verdict in verdicts(report, OURS, "several"))
    assert not report.ok


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tinymodels", "package.module:factory"),
        ("nowhere.at_all:thing", "No module named 'nowhere'"),
        ("tinymodels:hostile", "RuntimeError: \\x1b[31mred"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line_and_exit_2(here: Path, spec: str, words: str) -> None:
    """Bad usage: said in a line, without control characters."""
    result = CliRunner().invoke(command, [spec])

    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "\x1b" not in result.output
    assert list((here / "tmp").iterdir()) == []


def test_poison_leaves_no_tensor_as_it_was() -> None:
    """What a load does not touch cannot pass for loaded, and is told from what was loaded wrongly."""
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("mask", torch.tensor([True, False]))
    expected = bits.scramble(model)

    bits.poison(model, expected)
    bits.poison(model, expected)

    found = bits.tensors_of(model)
    assert not any(bits.same_bits(found[name], expected[name]) for name in expected)
    assert bits.judge(found, expected, "", 0.0).verdict == NOTHING
    bits.refill(model, expected)
    assert bits.judge(bits.tensors_of(model), expected, "", 0.0).exact
    model.running_mean[0] += 1
    assert bits.judge(bits.tensors_of(model), expected, "", 0.0).verdict == (
        "1 of 6 tensors differ, the first is running_mean"
    )


def test_bits_are_compared_not_values() -> None:
    """NaN equals itself, -0.0 is not 0.0, and a dtype or shape apart is apart."""
    assert bits.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not bits.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not bits.same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not bits.same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert bits.same_bits(torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64))


def test_names_of_a_wrapper_are_told_from_other_names() -> None:
    """Right values under a wrapper's names are not exact; unknown names say which."""
    want = {"a": torch.ones(2), "b": torch.zeros(1)}
    wrapped = {f"module.module.{name}": value for name, value in want.items()}
    assert bits.judge(wrapped, want, "module.", 0.0).verdict == "names carry module."
    assert bits.judge({"a": want["a"]}, want, "", 0.0).verdict == "other names: b is missing"
    assert bits.judge({**want, "c": want["a"]}, want, "", 0.0).verdict == "other names: c is not the model's"


def made_up(ours: Outcome) -> MatrixReport:
    """Three rows that differ in their suffix only, one of them with another verdict of ours."""
    exact, error = Outcome(EXACT, EXACT, 0.5), failed(KeyError("no \x1b[31m\nsecond"))
    cells = []
    for row, mine in zip(pick(saved_from=rows.DDP, what="whole", writer="torch"), (exact, exact, ours), strict=True):
        for column in rows.COLUMNS:
            cells += [Cell(row, column, PLAIN, error), Cell(row, column, OURS, mine)]
    saves = tuple((cell.row, 0.1) for cell in cells[::4])
    return MatrixReport("pkg:make\x1b", 3, 1000, tuple(cells), saves, 9.0)


def test_rows_with_the_same_verdicts_are_one_line_and_all_are_counted() -> None:
    """A short table, and no cell that does not count."""
    report = made_up(Outcome(NOTHING, NOTHING))
    assert [line.suffixes for line in tables.grouped(report)] == [(".pt", ".pth"), (".pkl",)]
    assert report.count(OURS) == (4, 6, 2.0)
    assert not report.ok
    assert made_up(Outcome(EXACT, EXACT)).ok


def test_lines_and_picture_are_safe_and_the_picture_has_no_times() -> None:
    """One line a cell, no raw control characters, and the same verdicts give the same bytes."""
    report = made_up(Outcome(NOTHING, NOTHING))
    lines = tables.plain_lines(report)
    assert sum(line.endswith((EXACT, NOTHING)) or "KeyError" in line for line in lines) == 12
    svg = tables.as_svg(report)
    assert "\x1b" not in "".join(lines) + svg + json.dumps(tables.as_data(report))
    assert "s of loading" in lines[-3]
    assert "s of loading" not in svg.replace("&#160;", " ")
    assert svg == tables.as_svg(made_up(Outcome(NOTHING, NOTHING)))


def test_the_table_fits_the_terminal_and_cuts_no_word() -> None:
    """From 80 columns on, with all that is not exact in footnotes where the room is scarce; below, plain lines."""
    cells = [
        Cell(row, column, loader, Outcome(EXACT, EXACT) if loader == OURS else failed(KeyError(row.label)))
        for row in rows.all_rows() for column in rows.COLUMNS for loader in (PLAIN, OURS)
    ]  # fmt: skip
    report = MatrixReport("pkg:make", 3, 1000, tuple(cells), tuple((cell.row, 0.1) for cell in cells[::4]), 9.0)
    for width in (80, 100, 120):
        console = Console(width=width, file=io.StringIO())
        table = tables.fitting(report, width)
        assert table is not None
        console.print(table)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in shown and all(line.rstrip() == line[:width].rstrip() for line in shown.splitlines())
        assert ("KeyError [1]" in shown) == (width > 80)
        assert f"[1] {failed(KeyError(cells[0].row.label)).verdict}" in " ".join(shown.split())
    assert tables.fitting(report, 60) is None


def test_the_slowest_and_the_worst_rank_speak_for_all() -> None:
    """Exact on several means exact on every rank; an error comes before a wrong result."""
    good, wrong, error = Outcome(EXACT, seconds=3.0), Outcome("x"), failed(ValueError("no"))
    assert merged([good, wrong]) == Outcome("x", seconds=3.0)
    assert merged([good, wrong, error]).error


def test_the_command_needs_no_torch_to_be_listed() -> None:
    """Help comes at once: torch stays out until the matrix runs."""
    import subprocess

    code = "import sys, anycard.cli.matrix, anycard.matrix; print('torch' in sys.modules, 'rich' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_json_is_the_report_and_exit_1_means_not_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs read the rows; scripts read the exit status; the picture is written all the same."""
    report = made_up(Outcome(NOTHING, NOTHING))
    monkeypatch.setattr("anycard.matrix.run_matrix", lambda spec, progress: report)

    result = CliRunner().invoke(command, ["a:b", "--json", "--svg", str(tmp_path / "table.svg")])

    data = json.loads(result.output)
    assert result.exit_code == 1
    assert data["ok"] is False
    assert data["counts"][OURS] == {"exact": 4, "cells": 6, "seconds": 2.0}
    assert [len(row["cells"]) for row in data["rows"]] == [4, 4, 4]
    assert (tmp_path / "table.svg").read_text().startswith("<svg")
