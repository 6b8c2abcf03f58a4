"""DeepSpeed's ZeRO folders: the step that is meant, and what the fp32 masters are called.

Source: deepspeed/runtime/engine.py `_save_checkpoint`, deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anycard.disk.folder import Folder
from anycard.disk.source import Source
from anycard.errors import FormatError
from anycard.pickles.brief import key_text

_LATEST = "latest"
_MOST = 256


def latest(folder: Folder, files: Mapping[str, int]) -> Folder | None:
    """The folder of the step that DeepSpeed's `latest` names, if there is one."""
    if not 0 < files.get(_LATEST, 0) <= _MOST:
        return None
    file: Source = folder.open(_LATEST)
    tag = file.read(0, file.size).decode("utf-8", "replace").strip()
    try:
        found = folder.open(tag)
    except FormatError:
        return None
    return found if isinstance(found, Folder) else None


def masters(tree: Any, files: Sequence[str]) -> dict[str, Any]:
    """What the fp32 masters are called, and the files that their parts lie in; nothing where it is no ZeRO folder."""
    parts = [name for name in files if name.endswith("_optim_states.pt")]
    groups = tree.get("param_shapes") if parts and isinstance(tree, dict) else None
    if isinstance(groups, Mapping):
        groups = [groups]
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        return {}
    return {"zero_fp32_masters": [key_text(name) for group in groups for name in group], "zero_fp32_files": parts}
