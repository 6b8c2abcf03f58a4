"""Archives and streams that claim what they do not hold, or inflate without end."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib

from bombs.making import DAG, FLOATS, ints, num, pid, read, refused, tensor, text, torch_zip


@refused
def deflated_pickle() -> bytes:
    return torch_zip(b"]" * (40 << 20), method=zipfile.ZIP_DEFLATED)


@refused
def deflated_storage() -> bytes:
    body = tensor(ints(1 << 24), ints(1), storage=pid(numel=num(1 << 24))) + b"."
    return torch_zip(body, bytes(1 << 26), zipfile.ZIP_DEFLATED)


def _entry(name: bytes, nbytes: int, stored: int, header: int, method: int = 0, crc: int = 0) -> bytes:
    sizes = struct.pack("<3L", crc, stored, nbytes)
    head = b"PK\x01\x02" + struct.pack("<6H", 20, 20, 0, method, 0, 0) + sizes
    return head + struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, header) + name


def _local(name: bytes, method: int = 0) -> bytes:
    return b"PK\x03\x04" + struct.pack("<5H3L2H", 20, 0, method, 0, 0, 0, 0, 0, len(name), 0) + name


def _archive(body: bytes, directory: bytes, count: int) -> bytes:
    return body + directory + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count, count, len(directory), len(body), 0)


@refused
def records_that_share_a_kernel() -> bytes:
    """Fifield's bomb: every record's data runs on through the headers behind it to one deflated kernel."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    kernel = squeeze.compress(bytes(1 << 24)) + squeeze.flush()
    names = [b"archive/data/%d" % i for i in range(1_000)]
    body, places = b"", []
    for name in names:
        places.append(len(body))
        body += _local(name, 8)
    end = len(body) + len(kernel)
    rows = [
        _entry(name, 1 << 24, end - place - 30 - len(name), place, 8) for name, place in zip(names, places, strict=True)
    ]
    return _archive(body + kernel, b"".join(rows), len(rows))


@refused
def end_records_over_one_directory() -> bytes:
    """Each may end an archive of several; the directory is found wrong at its last entry."""
    heads = [_local(b"%06d" % n) for n in range(4_000)]
    rows = [_entry(b"%06d" % n, 0, 0, n * len(heads[0])) for n in range(4_000)] + [_entry(b"000000", 0, 0, 0)]
    made = _archive(b"".join(heads), b"".join(rows), len(rows))
    return made + made[-22:] * 300


@refused
def records_of_one_name() -> bytes:
    name = b"archive/data.pkl"
    body = _local(name) + b"N."
    return _archive(body, _entry(name, 2, 2, 0) + _entry(name, 2, 2, 0), 2)


@refused
def record_that_holds_another() -> bytes:
    inner = _local(b"archive/data/0") + bytes(16)
    name = b"archive/data.pkl"
    body = _local(name) + inner
    rows = _entry(name, len(inner), len(inner), 0) + _entry(b"archive/data/0", 16, 16, len(_local(name)))
    return _archive(body, rows, 2)


@refused
def directory_that_claims() -> bytes:
    name = b"archive/data.pkl"
    end = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 62, 0)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, len(_local(name)) + 2, 1)
    body = _local(name) + b"N."
    return body + end + locator + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 0, 0, 0)


def legacy(body: bytes, keys: bytes, tail: bytes = b"") -> bytes:
    """A legacy stream out of its object's and its keys' opcodes."""
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + b"\x80\x02" + body + b"." + b"\x80\x02" + keys + b"." + tail


@refused
def legacy_storage_that_claims() -> bytes:
    body = tensor(ints(1 << 50), ints(1), storage=pid(numel=num(1 << 50)))
    return legacy(body, b"]" + text("0") + b"a", struct.pack("<q", 1 << 50))


@refused
def legacy_key_is_a_tree() -> bytes:
    return legacy(pid(key=DAG), b"]")


@refused
def legacy_keys_are_trees() -> bytes:
    return legacy(pid(), b"]" + DAG + b"a")


@refused
def legacy_view_is_a_tree() -> bytes:
    return legacy(b"(" + text("storage") + FLOATS + text("0") + text("cpu") + num(16) + DAG + b"tQ", b"]")


@refused
def legacy_magic_is_a_tree() -> bytes:
    good = legacy(b"N", b"]")
    return good[:40].replace(pickle.dumps(1001, 2), DAG + b".") + good[40:]


MANY = b"\x80\x02(" + b"N0" * 100_000 + b"t."  # steps that leave nothing


def _zipped(held: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, body in held.items():
            archive.writestr(f"archive/{name}", body)
    return out.getvalue()


@read
def pickled_weight_of_many_names() -> bytes:
    """One record of a .pt2, which each name would read anew."""
    meta = {"dtype": 7, "sizes": [], "strides": [], "storage_offset": {"as_int": 0}, "layout": 7,
            "requires_grad": False, "device": {"type": "cpu", "index": None}}  # fmt: skip
    entry = {"path_name": "w0", "is_param": True, "use_pickle": True, "tensor_meta": meta}
    config = json.dumps({"config": {f"w{number}": entry for number in range(500)}}).encode()
    inner = _zipped({"data.pkl": MANY, "version": b"3"})
    return _zipped({"data/weights/model_weights_config.json": config, "data/weights/w0": inner})


@read
def script_module_of_many_ids() -> bytes:
    """One script module of a package, by as many persistent ids."""
    call = b"ctorch.jit\nunpackage_script_module\n" + text("0") + b"\x85tQ"
    ids = (b"(" + text("reduce_package") + num(number) + call for number in range(500))
    module = b"\x80\x02c__torch__\nM\n)\x81}" + text("a") + MANY[2:-1] + b"sb."
    return _zipped(
        {
            ".data/extern_modules": b"",
            ".data/ts_code/0/data.pkl": module,
            "m/model.pkl": b"\x80\x02](" + b"".join(ids) + b"e.",
        }
    )


@read
def script_names_without_an_end() -> bytes:
    """Each quote in a class's head could begin a name that goes on to the end of the line."""
    head = b"class M(Module):\n  __parameters__ = [" + b'\\"' * 60_000 + b"\\\n"
    module = b"\x80\x02c__torch__\nM\n)\x81}" + text("a") + b"K\x01sb."
    return _zipped({"data.pkl": module, "constants.pkl": b"\x80\x02).", "code/__torch__.py": head})
