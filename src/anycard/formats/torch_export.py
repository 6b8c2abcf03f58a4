"""torch export (`torch.export.save`, `.pt2`): the program's state dict, and its constants beside.

Since 2.9 each tensor's storage is a record, described in JSON; until 2.8 `serialized_state_dict.pt` was a torch
file within the archive. Source: torch/export/pt2_archive/_package.py; torch/_export/serde/schema.py.
"""

from __future__ import annotations

import json
from typing import Any

from anycard.containers.inflated import record_bytes
from anycard.containers.zip_directory import Record
from anycard.disk.source import MemorySource, Source, WindowSource
from anycard.errors import FormatError
from anycard.formats import torch_zip
from anycard.formats.index import Index
from anycard.formats.torch_zip import Archive
from anycard.pickles.brief import brief
from anycard.pickles.budget import Budget
from anycard.pickles.stubs import Inert, inert_class
from anycard.pickles.views import ints, view
from anycard.tensors import DTYPES, Storage, TensorInfo

_MOST_JSON = 256 << 20
_WEIGHTS = "data/weights/"
_CONFIG = "_weights_config.json"
_OLD = "serialized_state_dict.pt"
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip
_STRIDED = 7


def read_index(archive: Archive) -> Index:
    """The index of an exported program (several: a dict by their names).

    Raises:
        FormatError: Damaged.
    """
    below = archive.below()
    tree: Any
    if _OLD in below:
        tree = _old(archive, below)
    else:
        reader = _Payloads(archive)
        models = [n[len(_WEIGHTS) : -len(_CONFIG)] for n in below if n.startswith(_WEIGHTS) and n.endswith(_CONFIG)]
        programs = {name: reader.program(name) for name in models if name}
        if not programs:
            raise FormatError("the file is an exported program whose weights are not where they should be", offset=0)
        tree = next(iter(programs.values())) if len(programs) == 1 else programs
    return Index("torch export", tree, archive.source, records=archive.records)


def _program(state: dict[str, Any], constants: dict[str, Any]) -> Inert:
    """As a module: parameters and buffers by their full names are its weights, constants are listed beside."""
    program: Inert = inert_class("torch.export", "ExportedProgram")()
    weights = {name: value for name, value in state.items() if isinstance(value, TensorInfo)}
    program.state = {
        "_parameters": {name: value for name, value in weights.items() if value.parameter},
        "_buffers": {name: value for name, value in weights.items() if not value.parameter},
        "_modules": {name: value for name, value in state.items() if name not in weights and isinstance(value, Inert)},
    }
    if constants:
        program.state["constants"] = constants
    return program


def _old(archive: Archive, below: dict[str, Record]) -> Inert:
    held = []
    for name in (_OLD, "serialized_constants.pt"):
        record = below.get(name)
        value = _torch_file(archive, record) if record is not None and record.nbytes else {}
        held.append({str(k): v for k, v in value.items()} if isinstance(value, dict) else {})
    return _program(held[0], held[1])


def _torch_file(archive: Archive, record: Record) -> Any:
    """The object of a torch zip that is a record."""
    source: Source
    if record.compressed:
        data = bytes(record_bytes(archive.source, record, archive.limits.index_nbytes))
        source = MemorySource(archive.source.name, data)
    else:
        source = WindowSource(archive.source, record.offset, record.nbytes)
    return torch_zip.read_index(source, archive.limits, nested=True).tree


class _Payloads:
    """Tensors by `model_weights_config.json` and kin: name -> record, sizes, strides."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._big = archive.big_endian()
        self._storages: dict[str, Storage] = {}
        self._pickled: dict[str, Any] = {}

    def program(self, name: str) -> Inert:
        """One exported program."""
        weights = self._config(f"{_WEIGHTS}{name}{_CONFIG}", _WEIGHTS)
        return _program(weights, self._config(f"data/constants/{name}_constants_config.json", "data/constants/"))

    def _config(self, name: str, folder: str) -> dict[str, Any]:
        record = self._archive.find(name)
        if record is None:
            return {}
        if record.nbytes > _MOST_JSON:
            raise FormatError(f"record {brief(name)} has {record.nbytes:,} bytes", offset=record.offset)
        data = torch_zip.index_bytes(self._archive, record)
        try:
            entries = json.loads(data)["config"]
            return {str(key): self._payload(folder, entry, len(data)) for key, entry in entries.items()}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FormatError):
                error.offset = record.offset if error.offset is None else error.offset
                raise
            reason = f"record {brief(name)} does not describe tensors ({str(error)[:100]})"
            raise FormatError(reason, offset=record.offset) from None

    def _payload(self, folder: str, entry: dict[str, Any], nbytes: int) -> Any:
        path, meta = entry["path_name"], entry["tensor_meta"]
        record = self._archive.find(folder + path)
        if record is None and (meta is None or _numel(meta)):
            raise FormatError(f"the archive has no record {brief(folder + path)}")
        if meta is None:  # an object of a class of its own
            return inert_class("torch.export", "custom_object")()
        if entry["use_pickle"] and record is not None:
            if record.name not in self._pickled:
                self._pickled[record.name] = _torch_file(self._archive, record)
            value = self._pickled[record.name]
            return value.replace(parameter=entry["is_param"] is True) if isinstance(value, TensorInfo) else value
        return self._tensor(record, folder + path, meta, nbytes).replace(parameter=entry["is_param"] is True)

    def _tensor(self, record: Record | None, path: str, meta: dict[str, Any], nbytes: int) -> TensorInfo:
        dtype = _DTYPES.get(meta["dtype"])
        if dtype is None or meta["layout"] != _STRIDED:
            raise FormatError(f"{brief(path)} is a tensor of a dtype or layout that anycard does not know")
        storage = self._storages.get(path)
        if storage is None:
            storage = self._storages[path] = self._storage(record, path, meta["device"])
        budget = Budget(self._archive.limits, nbytes)
        size, stride = (ints(budget, [n["as_int"] for n in meta[part]], part) for part in ("sizes", "strides"))
        (first,) = ints(budget, [meta["storage_offset"]["as_int"]], "offset")
        start = first * DTYPES[dtype].itemsize
        return view(storage, dtype, start, size, stride, requires_grad=meta["requires_grad"] is True)

    def _storage(self, record: Record | None, key: str, device: dict[str, Any]) -> Storage:
        index = device.get("index")
        if type(index) not in (int, type(None)):
            raise TypeError("a device's number is none")
        tag = f"{device['type']}"[:40] + ("" if index is None else f":{index}"[:40])
        if record is None:
            return Storage(key, 0, tag, data=b"")
        return torch_zip.storage_of(self._archive, record, key, tag, self._big)


def _numel(meta: dict[str, Any]) -> bool:
    return 0 not in [n["as_int"] for n in meta["sizes"]]
