"""Set before torch is imported: the tests run a process for each core, so a process needs one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
