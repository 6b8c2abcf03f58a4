"""The command line, as a terminal, a pipe and a program see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import anycard
from anycard.cli.main import VERBS, cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few files: weights in two formats, of DataParallel, a training checkpoint, a whole model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    anycard.save(model, tmp_path / "a.pth")
    anycard.save(model, tmp_path / "a.safetensors")
    anycard.save(model, tmp_path / "whole.pt", whole=True)
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "parallel.pth")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model(torch.rand(2, 3, 6, 6)[..., :6]).sum().backward()
    optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "train.ckpt")
    return tmp_path


def run(*args: object) -> Result:
    """One call in this process."""
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def shell(command: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """One call through a shell, as people do."""
    line = command.replace("anycard", f"{sys.executable} -m anycard")
    return subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, **env}, timeout=60)


def test_show_says_what_is_in_a_file(folder: Path) -> None:
    """Format, size, wrappers and every tensor; other things are summed up."""
    out = run("show", folder / "parallel.pth").output
    assert "torch zip, 9 tensors" in out
    assert "wrappers in the names, dropped on load: module" in out
    assert "module.0.weight" in out
    out = run("show", folder / "train.ckpt").output
    assert "epoch" in out.splitlines()[-1]
    assert "optimizer (" in out.splitlines()[-1]


def test_show_names_are_canonical(folder: Path) -> None:
    """--names gives one canonical name a line, in the file's order."""
    names = run("show", "--names", folder / "parallel.pth").output.split()
    assert names[:3] == ["0.weight", "0.bias", "1.weight"]


def test_show_tree_prints_a_module_as_print_does(folder: Path) -> None:
    """Class names and the arguments that the modules were made with, from inert data."""
    lines = run("show", "--tree", folder / "whole.pt").output.splitlines()
    assert lines[0] == "Sequential("
    assert "(0): Conv2d(in_channels=3, out_channels=4, kernel_size=(3, 3)" in lines[1]
    assert "(1): BatchNorm2d(num_features=4, eps=1e-05" in lines[2]
    assert lines[-1] == ")"


def test_show_tree_of_a_key(folder: Path) -> None:
    """The part that the key names, also one within a whole model; a wrong key is refused with the choices."""
    part = run("show", "--tree", "--key", "1", folder / "whole.pt").output
    assert part.startswith("BatchNorm2d(num_features=4")
    lines = run("show", "--tree", "--key", "state_dict", folder / "train.ckpt").output.splitlines()
    assert len(lines) == 10 and lines[1] == "  0.weight: float32 4 x 3 x 3 x 3"
    refused = run("show", "--tree", "--key", "nothing", folder / "train.ckpt").exception
    assert isinstance(refused, anycard.CheckpointError) and "it holds 'state_dict'" in str(refused)


def test_json_is_data(folder: Path) -> None:
    """Every verb that reads gives JSON with the facts, unrounded."""
    shown: dict[str, Any] = json.loads(run("show", "--json", folder / "a.pth").output)
    assert shown["format"] == "torch zip"
    assert shown["tensors"]["0.weight"] == {
        "dtype": "float32", "shape": [4, 3, 3, 3], "device": "cpu", "nbytes": 432,
        "offset": shown["tensors"]["0.weight"]["offset"], "file": str(folder / "a.pth"),
    }  # fmt: skip
    checked = json.loads(run("check", "--json", folder / "a.pth", "torch.nn:Identity").output)
    assert not checked["fits"]
    assert len(checked["unexpected"]) == 9
    assert json.loads(run("diff", "--json", folder / "a.pth", folder / "a.safetensors").output)["equal"]
    assert json.loads(run("verify", "--json", folder / "a.pth").output)["ok"]
    mark = json.loads(run("fingerprint", "--json", folder / "a.pth").output)["fingerprint"]
    assert mark.startswith("blake3:")
    assert len(mark) == 7 + 64
    done = json.loads(run("convert", "--json", folder / "a.pth", folder / "b.safetensors").output)
    assert done["tensors"] == 9


def test_fingerprint_is_the_same_everywhere(folder: Path) -> None:
    """Format, wrapper and whole model make no difference."""
    files = ("a.pth", "a.safetensors", "parallel.pth", "whole.pt")
    trained = run("fingerprint", folder / "train.ckpt").output
    assert len({run("fingerprint", folder / name).output for name in files}) == 1
    assert trained != run("fingerprint", folder / "a.pth").output


def test_diff_tells_what_differs_and_exits_1(folder: Path) -> None:
    """0 where the weights are the same, 1 with a line for each difference."""
    assert run("diff", folder / "a.pth", folder / "parallel.pth").exit_code == 0
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3))
    anycard.save(other, folder / "other.pth")
    found = run("diff", folder / "a.pth", folder / "other.pth")
    assert found.exit_code == 1
    assert "2 x 4 in A, 3 x 4 in B" in found.output


def test_convert_says_what_stays_behind(folder: Path) -> None:
    """To safetensors the state dict is taken where it alone holds tensors; else the places are listed."""
    refused = run("convert", folder / "train.ckpt", folder / "t.safetensors")
    assert isinstance(refused.exception, anycard.CheckpointError)
    assert "key='state_dict'" in str(refused.exception)
    assert not (folder / "t.safetensors").exists()
    taken = run("convert", "--key", "state_dict", folder / "train.ckpt", folder / "t.safetensors")
    assert taken.exit_code == 0
    assert "left behind: optimizer (" in taken.stderr
    assert "epoch" in taken.stderr


def test_convert_to_a_torch_zip_keeps_everything(folder: Path) -> None:
    """A training checkpoint stays one, under canonical names, readable by plain torch."""
    assert run("convert", folder / "train.ckpt", folder / "t.pth").exit_code == 0
    theirs, ours = (torch.load(folder / n, weights_only=True) for n in ("train.ckpt", "t.pth"))
    assert ours["epoch"] == 3
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert torch.equal(ours["optimizer"]["state"][0]["momentum_buffer"],
                       theirs["optimizer"]["state"][0]["momentum_buffer"])  # fmt: skip
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert ours["state_dict"]._metadata == theirs["state_dict"]._metadata


def test_verify_names_the_tensor_that_rotted(folder: Path) -> None:
    """A flipped bit is found in both formats; exit status 1."""
    for name in ("a.pth", "a.safetensors"):
        with anycard.open(folder / name) as ckpt:
            offset = ckpt.tensors["2.weight"].offset
        data = bytearray((folder / name).read_bytes())
        assert offset is not None
        data[offset] ^= 1
        (folder / name).write_bytes(data)
        found = run("verify", folder / name)
        assert found.exit_code == 1
        assert "2.weight" in found.output


def test_check_finds_models_of_the_current_folder(folder: Path) -> None:
    """MODEL is looked up from where the command runs; a mismatch is exit 1, a wrong MODEL 2."""
    (folder / "mine.py").write_text("from torch import nn\ndef small():\n    return nn.Sequential(nn.Linear(4, 2))\n")
    fits = shell(f"cd {folder} && anycard check a.pth mine:small")
    assert fits.returncode == 1
    assert b"does not fit" in fits.stdout
    assert shell(f"cd {folder} && anycard check a.pth mine:none").returncode == 2


@pytest.mark.parametrize("content", [b"", b"<html>", os.urandom(300), b"PK\x03\x04" + b"\0" * 99])
@pytest.mark.parametrize("verb", ["show", "fingerprint", "verify"])
def test_what_cannot_be_read_is_one_line_and_exit_2(tmp_path: Path, verb: str, content: bytes) -> None:
    """No traceback: the file and the reason, on stderr."""
    (tmp_path / "x.pth").write_bytes(content)
    for target in ("x.pth", "none.pth", "."):
        result = shell(f"cd {tmp_path} && anycard {verb} {target}")
        assert result.returncode == 2
        assert b"Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_hostile_names_reach_no_terminal(tmp_path: Path) -> None:
    """Escape sequences and line feeds in names are spelt out, in every verb, and LANG=C is no obstacle."""
    names = {
        "\x1b[31mred\x07": torch.ones(1),
        "two\nlines": torch.ones(2),
        "\u202egnp": torch.ones(1),
        "名": torch.ones(3),
    }
    anycard.save(names, tmp_path / "h.pth")
    anycard.save({}, tmp_path / "none.pth")
    for command in ("show h.pth", "show --names h.pth", "show --tree h.pth", "diff h.pth none.pth"):
        out = shell(f"cd {tmp_path} && anycard {command}", LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii")
        assert out.returncode in (0, 1, 2), out.stderr
        assert b"\x1b" not in out.stdout + out.stderr
        assert b"UnicodeEncodeError" not in out.stderr
        assert "\u202e".encode() not in out.stdout


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    """`| head -1` is no error."""
    anycard.save({f"w{i}": torch.ones(1) for i in range(5000)}, tmp_path / "many.pth")
    out = shell(f"set -o pipefail; anycard show --names {tmp_path}/many.pth | head -1")
    assert (out.stdout, out.stderr, out.returncode) == (b"w0\n", b"", 0)


def test_a_closed_pipe_does_not_change_the_verdict(folder: Path) -> None:
    """Who reads nothing still gets the exit status, from every verb that gives one, and from what fails."""
    data = bytearray((folder / "a.pth").read_bytes())
    with anycard.open(folder / "a.pth") as ckpt:
        data[ckpt.tensors["0.weight"].offset or 0] ^= 1
    (folder / "bad.pth").write_bytes(data)
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (folder / "mine.py").write_text("import torch\ndef build(): return torch.nn.Linear(2, 2)\n")
    verbs = {
        "scan evil.pt": 1, "scan a.pth": 0, "diff a.pth bad.pth": 2, "diff a.pth train.ckpt": 1,
        "verify bad.pth": 1, "verify bad.pth --json": 1, "check a.pth mine:build": 1, "show absent.pth": 2,
        "show a.pth": 0, "nonsense": 2, "--help": 0,
    }  # fmt: skip
    for verb, status in verbs.items():
        for pipe in ("|", "2>&1 |")[-1 if status != 1 else 0 :]:
            out = shell(f"cd {folder}; anycard {verb} {pipe} (exec <&-; sleep 0.01); exit ${{PIPESTATUS[0]}}")
            assert out.returncode == status, (verb, pipe)
            assert b"Traceback" not in out.stderr and b"Broken" not in out.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_below_the_output_is_told(folder: Path) -> None:
    """One line, and exit 2: what was to be read is not there."""
    out = shell(f"cd {folder}; anycard scan a.pth > /dev/full")
    assert (out.returncode, out.stderr.count(b"\n")) == (2, 1) and b"No space left" in out.stderr


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    """A named pipe without a writer would block for ever: it is said that a file is needed."""
    os.mkfifo(tmp_path / "pipe.pth")
    out = shell(f"anycard show {tmp_path}/pipe.pth")
    assert out.returncode == 2
    assert b"put it into a file first" in out.stderr


def test_what_json_lacks_is_text(tmp_path: Path) -> None:
    """NaN and infinity beside the weights leave the output valid for strict parsers."""
    torch.save({"w": torch.ones(1), "best": float("nan"), "worst": float("-inf")}, tmp_path / "a.pth")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    shown = json.loads(run("show", "--json", tmp_path / "a.pth").output, parse_constant=refuse)
    assert shown["objects"] == {"best": "nan", "worst": "-inf"}


@pytest.mark.parametrize("body", ["raise KeyError('config')", "return 1 / 0", "return 3", "raise SystemExit(0)"])
def test_a_factory_that_fails_is_bad_usage_not_a_mismatch(folder: Path, body: str) -> None:
    """What the model's own code raises is one line and exit 2; 1 would say that the file does not fit."""
    (folder / "mine.py").write_text(f"def broken():\n    {body}\n")
    out = shell(f"cd {folder} && anycard check a.pth mine:broken")
    assert out.returncode == 2
    assert b"Traceback" not in out.stderr


def test_what_a_models_module_does_is_no_part_of_the_answer(folder: Path) -> None:
    """It may end the program, print, and raise what would paint the terminal."""
    (folder / "ends.py").write_text("import sys\nsys.exit(1)\n")
    (folder / "prints.py").write_text(
        "from torch import nn\nprint('import')\ndef red(): raise ValueError('\\x1b]0;red')\n"
        "def make():\n    print('call')\n    return nn.Identity()\n"
    )
    ends = shell(f"cd {folder} && anycard check a.pth ends:make")
    assert (ends.returncode, b"ends:make: SystemExit: 1" in ends.stderr) == (2, True)
    red = shell(f"cd {folder} && anycard check a.pth prints:red")
    assert (red.returncode, b"\x1b" in red.stderr, b"\\x1b]0;red" in red.stderr) == (2, False, True)
    odd = shell(f"cd {folder} && anycard check a.pth $'a\\x1bb:c'")
    assert (odd.returncode, b"\x1b" in odd.stderr) == (2, False)
    answer = shell(f"cd {folder} && anycard check --json a.pth prints:make")
    assert json.loads(answer.stdout)["fits"] is False
    assert answer.stderr.split() == [b"import", b"call"]


def test_an_interrupt_is_no_answer(folder: Path) -> None:
    """130, as shells have it, and a line."""
    (folder / "slow.py").write_text(
        "import os, signal\ndef make():\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    out = shell(f"cd {folder} && anycard check a.pth slow:make")
    assert (out.returncode, out.stdout, out.stderr.strip()) == (130, b"", b"anycard: interrupted")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_stream_that_is_not_there_changes_no_status(folder: Path, closed: str) -> None:
    """As cron and some supervisors start programs."""
    for verb, status in (("verify a.pth", 0), ("verify none.pth", 2), ("verify", 2), ("diff a.pth train.ckpt", 1)):
        assert shell(f"cd {folder} && anycard {verb} {closed}").returncode == status, verb


def test_errors_are_spelt_as_options(folder: Path) -> None:
    """No Python on the command line, in errors and in warnings."""
    torch.save({name: nn.Linear(2, 2).state_dict() for name in ("model", "ema")}, folder / "two.pt")
    (folder / "mine.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 2)\n")
    with zipfile.ZipFile(folder / "both.zip", "w") as archive:
        archive.write(folder / "a.pth", "a.pth")
        archive.write(folder / "two.pt", "two.pt")
    for line in ("fingerprint two.pt", "check two.pt mine:make", "convert two.pt a.safetensors"):
        said = shell(f"cd {folder} && anycard {line}").stderr
        assert b"--key 'model'" in said and b"key=" not in said, line
    said = shell(f"cd {folder} && anycard show both.zip").stderr
    assert b"Pick one with --member, for example --member 'a.pth'" in said and b"member=" not in said
    said = shell(f"cd {folder} && anycard show --member x a.pth").stderr
    assert b"--member picks nothing" in said


def test_rot_does_not_become_valid(folder: Path) -> None:
    """A damaged file is not given fresh checksums by a conversion, in either format, nor a fingerprint."""
    for name in ("a.pth", "a.safetensors"):
        with anycard.open(folder / name) as ckpt:
            offset = ckpt.tensors["0.weight"].offset
        data = bytearray((folder / name).read_bytes())
        assert offset is not None
        data[offset] ^= 1
        (folder / name).write_bytes(data)
        for target in ("new.pt", "new.safetensors"):
            refused = run("convert", folder / name, folder / target)
            assert isinstance(refused.exception, anycard.FormatError)
            assert not (folder / target).exists()
        assert isinstance(run("fingerprint", folder / name).exception, anycard.FormatError)


def test_rot_in_a_memory_that_tensors_share_does_not_become_valid(tmp_path: Path) -> None:
    """No tensor is all of it, as in the flat weights of an RNN: its checksum is looked at all the same."""
    flat = torch.arange(3000.0)
    source, whole = tmp_path / "a.pt", tmp_path / "whole.pt"
    torch.save({"a": flat[:1000], "b": flat[1000:2000], "more": {"b": torch.ones(3)}}, source)
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Buffer(flat[:1000]), torch.nn.Buffer(flat[1000:])
    anycard.save(model, whole, whole=True)
    for path in (source, whole):
        run("fingerprint", path)
        with anycard.open(path) as ckpt:
            offset = ckpt.tensors["b"].offset
        data = bytearray(path.read_bytes())
        assert offset is not None
        data[offset + 7] ^= 0x40
        for target in ("new.pt", "new.safetensors"):
            assert run("convert", path, tmp_path / target).exit_code == 0
            (tmp_path / target).unlink()
        path.write_bytes(data)
        for target in ("new.pt", "new.safetensors"):
            with pytest.raises(anycard.FormatError, match="damaged"):
                anycard.convert(path, tmp_path / target)
            assert not (tmp_path / target).exists()
        assert isinstance(run("fingerprint", path).exception, anycard.FormatError)


def test_every_verb_has_help() -> None:
    """Each verb explains itself, and the list names them all."""
    listed = run("--help").output
    for verb in VERBS:
        assert verb in listed
        assert run(verb, "--help").exit_code == 0
    assert run("shwo").exit_code == 2
