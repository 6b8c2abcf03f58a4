"""What fuzzing found stays mended: every file of `fuzz/finds.tsv`, each read wholly, in one bare process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.readers import READERS

HERE = Path(__file__).parent
RUN = """
import json
from fuzz.ends import end_of
from fuzz.finds import finds
for find in finds():
    print(json.dumps([find.reader, find.name, *end_of(find.data, find.folder == "folder")]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs /proc or what is like it")
def test_finds_end_well() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, timeout=200, check=False, cwd=HERE
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows[-1:], done.stderr[-500:])
    assert len(rows) > 1
    # Twice the time: other tests run beside.
    assert [row for row in rows if row[2] != "well" and not (row[2] == "slow" and row[4] < 2)] == []


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_every_reader_has_its_seeds(tmp_path: Path, name: str) -> None:
    """What `make fuzz` begins with can be made."""
    assert any(len(data) < 60_000 for data in READERS[name].seeds(tmp_path))
