"""The property: whatever a file holds, reading it ends in an answer, within bounds, and in the same one twice.

    python tests/fuzz/ends.py FILE [FOLDER]     # what comes of one input; FOLDER where it is the zip of a folder

Without torch and without atheris: the regression test runs it as well as the fuzzer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anycard.checkpoint import Checkpoint, open_checkpoint
from anycard.errors import ChoiceError, FormatError, UntrustedError
from anycard.limits import Limits
from anycard.names.module_tree import tree_lines
from anycard.operations.scanning import scan
from anycard.operations.verification import verify_checkpoint

SECONDS = 1.0  # of CPU time
NBYTES = 256 << 20
_LIMITS = Limits(expanded_nbytes=16 << 20)  # a view of more is an error when read: the read is bounded
_MOST_TENSORS = 200
_MOST_READ = 32 << 20
_LONGEST_MESSAGE = 20_000
_MEMORY = Path("/dev/shm")
_FILES = Path("/proc/self/fd")
_STATUS = Path("/proc/self/status")


class End(NamedTuple):
    """What came of an input.

    Attributes:
        kind: "well", or what is wrong: "raises", "slow", "large", "unequal", "left open".
        detail: Of what is wrong: the same for inputs that show the same fault.
        seconds: CPU time of one round.
        nbytes: Memory that it took at its peak.
        opened: The file was read, not refused.
    """

    kind: str
    detail: str = ""
    seconds: float = 0.0
    nbytes: int = 0
    opened: bool = False


def end_of(data: bytes, folder: bool, *, twice: bool = True) -> End:
    """Write the input to a file or a folder, and read all of it that can be asked for."""
    with _on_disk(data, folder) as path:
        return End("well") if path is None else _end(path, twice)


def _end(path: Path, twice: bool) -> End:
    files, before = _open_files(), _reset_peak()
    start = time.process_time()
    try:
        first, opened = _answer(path)
        seconds, nbytes = time.process_time() - start, _peak() - before
        same = not twice or _answer(path)[0] == first
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the find
        return End("raises", _fault(error))
    kind = "slow" if seconds > SECONDS else "large" if nbytes > NBYTES else "well" if same else "unequal"
    if kind == "well" and _open_files() > files:
        kind = "left open"
    return End(kind, "", seconds, nbytes, opened)


def _fault(error: BaseException) -> str:
    """The exception's class, and the innermost function of anycard that it came through."""
    at = error.__traceback__
    where = ""
    while at is not None:
        code = at.tb_frame.f_code
        if "anycard" in code.co_filename:
            where = f"{Path(code.co_filename).stem}.{code.co_name}"
        at = at.tb_next
    return f"{type(error).__name__} in {where or 'the check'}"


def _answer(path: Path) -> tuple[str, bool]:
    """Everything that anycard says of a file, as a hash; and whether it opens."""
    said = hashlib.blake2b(digest_size=16)

    def ask(look: Callable[[], Any]) -> Any:
        """An answer, or one of the errors that say what is wrong with the file."""
        try:
            value = look()
            said.update(repr(value).encode("utf-8", "surrogatepass"))
        except (FormatError, UntrustedError, ChoiceError) as error:
            text = str(error)
            assert len(text) < _LONGEST_MESSAGE, "an endless message"
            said.update(text.encode("utf-8", "surrogatepass"))
            return None
        return value

    opened: list[Checkpoint] = []
    ask(lambda: opened.append(open_checkpoint(path, limits=_LIMITS)))
    for ckpt in opened:
        with ckpt:
            _ask_all(ckpt, ask)
    report = ask(lambda: scan(path))
    assert report is not None, "scan refuses"
    return said.hexdigest(), bool(opened)


def _ask_all(ckpt: Checkpoint, ask: Callable[[Callable[[], Any]], Any]) -> None:
    tensors = ask(lambda: [(n, i.dtype, i.shape, i.stride, i.device, i.nbytes) for n, i in ckpt.tensors.items()]) or []
    for look in (
        lambda: ckpt.objects, lambda: ckpt.metadata, lambda: ckpt.wrappers, lambda: list(tree_lines(ckpt.tree)),
        lambda: list(ckpt.weights()), lambda: verify_checkpoint(ckpt), lambda: repr(ckpt),
    ):  # fmt: skip
        ask(look)
    small = [name for name, *_, nbytes in tensors[:_MOST_TENSORS] if nbytes < _MOST_READ]
    for name in small:
        ask(lambda name=name: ckpt.numpy(name, raw=True).tobytes())
    if sum(nbytes for *_, nbytes in tensors) < _MOST_READ:
        ask(ckpt.fingerprint)


@contextlib.contextmanager
def _on_disk(data: bytes, folder: bool) -> Iterator[Path | None]:
    """The input as a file, or the folder that it is the zip of; None where it is no such zip."""
    root = Path(tempfile.mkdtemp(prefix="anycard-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None))
    try:
        path = root / "input.pt"
        if not folder:
            path.write_bytes(data)
        yield path if not folder or _unpacked(data, path) else None
    finally:
        shutil.rmtree(root)


def _unpacked(data: bytes, path: Path) -> bool:
    """Only files of plain names, and few; False where the zip is none, as the standard library says in many ways."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()[:50]
            held = {info.filename: archive.read(info) for info in infos if info.file_size < 1 << 20}
    except Exception:  # noqa: BLE001 - it is the input's wrapping, not what is tested
        return False
    path.mkdir()
    for name, body in held.items():
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            return False
        try:
            path.joinpath(*parts[:-1]).mkdir(parents=True, exist_ok=True)
            path.joinpath(*parts).write_bytes(body)
        except (OSError, ValueError):
            return False
    return bool(held)


def _open_files() -> int:
    return len(list(_FILES.iterdir())) if _FILES.is_dir() else 0


def _reset_peak() -> int:
    """Begin to measure the peak of memory anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(json.dumps(end_of(Path(sys.argv[1]).read_bytes(), len(sys.argv) > 2)))
