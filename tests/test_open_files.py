"""A checkpoint that is let go gives its files back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anycard

MANY = """
import gc, resource, sys, anycard
gc.disable()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
for _ in range(400):
    ckpt = anycard.open(sys.argv[1])
    assert list(ckpt.weights()) == ["w"] and ckpt.state_dicts and ckpt.numpy("w").size == 3
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on open files")
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "folder"])
def test_what_is_not_closed_by_hand_is_closed(tmp_path: Path, name: str) -> None:
    """400 files are opened and dropped where 256 may be open at once; nothing waits for the collector."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    anycard.save({"w": torch.ones(3)}, path / "model.safetensors" if name == "folder" else path)
    done = subprocess.run([sys.executable, "-c", MANY, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_tensor_can_be_read_while_something_holds_its_file(tmp_path: Path) -> None:
    """A `TensorInfo` outlives the checkpoint that it was taken from."""
    from anycard.checkpoint import as_numpy

    anycard.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    info = anycard.open(tmp_path / "a.pth").weights()["w"]
    assert as_numpy(info).tolist() == [1, 1, 1]
