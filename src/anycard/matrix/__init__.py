"""Every way of saving x every way of loading, run and compared bit for bit.

Nothing here imports torch in the calling process: models live in worker processes only.
"""

from anycard.matrix.results import Cell, MatrixReport, Outcome
from anycard.matrix.rows import Row
from anycard.matrix.runner import ModelError, run_matrix

__all__ = ["Cell", "MatrixReport", "ModelError", "Outcome", "Row", "run_matrix"]
