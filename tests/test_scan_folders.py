"""`anycard scan` of a folder comes to every file that a program which opens the folder could, or says which not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import anycard

EVIL = b"cos\nsystem\n(S'true'\ntR."
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")


@needs_links
def test_folders_behind_links_are_scanned_once(tmp_path: Path) -> None:
    """A link to a folder leads in, as in a cache of models; links that lead back end nothing."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "bad.bin").write_bytes(EVIL)
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "link").symlink_to(tmp_path / "blobs")
    (tmp_path / "model" / "sub" / "again").symlink_to(tmp_path / "blobs")
    (tmp_path / "model" / "sub" / "back").symlink_to(tmp_path / "model")
    report = anycard.scan(tmp_path / "model")
    assert [finding.where for finding in report.bad] == ["link/bad.bin"]
    assert not report.unreadable


@needs_links
def test_a_link_to_nothing_does_not_end_the_scan(tmp_path: Path) -> None:
    """It is told, beside what the other files hold; of the path that was asked for it is an error."""
    (tmp_path / "a.pt").symlink_to("nowhere")
    (tmp_path / "b.pt").symlink_to("b.pt")
    (tmp_path / "c.bin").write_bytes(EVIL)
    torch.save({"w": torch.ones(1)}, tmp_path / "d.pt")
    report = anycard.scan(tmp_path)
    assert [finding.where for finding in report.bad] == ["c.bin"]
    assert [line.partition(":")[0] for line in report.unreadable] == ["a.pt", "b.pt"]
    with pytest.raises(FileNotFoundError):
        anycard.scan(tmp_path / "a.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a path that is too long to be opened")
def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    """It may hold anything, so the folder above is not clean."""
    torch.save({"w": torch.ones(1)}, tmp_path / "good.pt")
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(20):
            os.mkdir("x" * 250)  # noqa: PTH102 - where no full path can be spelt
            os.chdir("x" * 250)
        Path("bad.bin").write_bytes(EVIL)
    finally:
        os.chdir(here)
    report = anycard.scan(tmp_path)
    assert not report.clean
    assert "File name too long" in report.unreadable[0]
