"""Small files that ask for endless work: each function makes one. A new attack is one function more.

Without torch, so that a bare process can run them. Each must be refused or read within a second and
256 MiB; which of the two is said by the list that it stands in.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable

Bomb = Callable[[], bytes]
REFUSED: list[Bomb] = []
READ: list[Bomb] = []

FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
DAG = b"K\x00K\x01\x86" + b"2\x86" * 60  # t = (t, t), 60 times: 2**60 leaves
DEEP = b"N" + b"\x85" * 1_000_000
TIMES = 5_000


def refused(bomb: Bomb) -> Bomb:
    REFUSED.append(bomb)
    return bomb


def read(bomb: Bomb) -> Bomb:
    READ.append(bomb)
    return bomb


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def num(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def torch_zip(data: bytes, storage: bytes = bytes(64), method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip of a pickle and one storage."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as held:
        for name, body in (("data.pkl", data), ("byteorder", b"little"), ("data/0", storage), ("version", b"3\n")):
            held.writestr(f"archive/{name}", body)
    return out.getvalue()


def pid(kind: bytes = FLOATS, key: bytes = text("0"), place: bytes = text("cpu"), numel: bytes = num(16)) -> bytes:
    """A persistent id as torch writes it, from the opcodes of its parts."""
    return b"(" + text("storage") + kind + key + place + numel + b"tQ"


def tensor(size: bytes, stride: bytes, offset: bytes = num(0), storage: bytes | None = None) -> bytes:
    return REBUILD + b"(" + (storage or pid()) + offset + size + stride + b"\x89NtR"


def ints(*values: int) -> bytes:
    return b"(" + b"".join(map(num, values)) + b"t"


def repeated(make: bytes, argument: bytes, call: bytes = b"\x85R0", times: int = TIMES) -> bytes:
    """`make(argument)`, over and over: both come out of the memo."""
    return b"\x80\x02" + make + b"q\x00" + argument + b"q\x01" + (b"h\x00h\x01" + call) * times + b"."


NUMBERS = b"](" + b"K\x01" * 20_000 + b"e"
PAIRS = b"](" + b"(K\x01K\x02t" * 20_000 + b"e"


def builtin(name: str) -> bytes:
    return f"cbuiltins\n{name}\n".encode()


@refused
def lists() -> bytes:
    return torch_zip(repeated(builtin("list"), NUMBERS))


@refused
def lists_that_stay() -> bytes:
    return torch_zip(repeated(builtin("list"), NUMBERS, b"\x85R"))


@refused
def tuples() -> bytes:
    return torch_zip(repeated(builtin("tuple"), NUMBERS, b"\x85R"))


@refused
def sizes() -> bytes:
    return torch_zip(repeated(b"ctorch\nSize\n", NUMBERS, b"\x85R"))


@refused
def sets() -> bytes:
    return torch_zip(repeated(builtin("set"), b"](" + b"".join(map(num, range(20_000))) + b"e", b"\x85R"))


@refused
def frozensets() -> bytes:
    return torch_zip(repeated(builtin("frozenset"), NUMBERS, b"\x85R"))


@refused
def dicts() -> bytes:
    return torch_zip(repeated(builtin("dict"), PAIRS, b"\x85R"))


@refused
def ordered_dicts() -> bytes:
    return torch_zip(repeated(b"ccollections\nOrderedDict\n", PAIRS, b"\x85R"))


@refused
def counters() -> bytes:
    pairs = b"}(" + b"".join(num(i) + b"K\x01" for i in range(20_000)) + b"u"
    return torch_zip(repeated(b"ccollections\nCounter\n", pairs, b"\x85R"))


@refused
def encodings() -> bytes:
    return torch_zip(repeated(b"c_codecs\nencode\n", text("a" * 100_000), b"X\x06\0\0\0latin1\x86R"))


@refused
def bytearrays() -> bytes:
    return torch_zip(repeated(builtin("bytearray"), b"B" + struct.pack("<I", 100_000) + bytes(100_000), b"\x85R"))


@refused
def texts() -> bytes:
    return torch_zip(repeated(builtin("complex"), text("1" * 100_000)))


@refused
def arguments_of_a_stub() -> bytes:
    return torch_zip(repeated(b"cx\ny\n", b"(" + b"N" * 20_000 + b"t", b"R"))


@refused
def arguments_of_a_new_object() -> bytes:
    return torch_zip(repeated(b"cx\ny\n", b"(" + b"N" * 20_000 + b"t", b"\x81"))


@refused
def keywords_of_a_new_object() -> bytes:
    keywords = b"}(" + b"".join(text(f"k{i}") + b"N" for i in range(5_000)) + b"u"
    return torch_zip(repeated(b"cx\ny\n", keywords, b"q\x010)h\x01\x92"))


@refused
def attributes_of_ordered_dicts() -> bytes:
    state = b"}(" + b"".join(text(f"_k{i}") + b"N" for i in range(5_000)) + b"u"
    return torch_zip(repeated(b"ccollections\nOrderedDict\n", state, b"0)Rh\x01b"))


@refused
def arrays_of_old_text() -> bytes:
    """Python 2's byte string as an array's bytes, encoded anew for each array."""
    data = b"T" + struct.pack("<I", 200_000) + b"a" * 200_000
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"
    state = b"(K\x01" + ints(200_000) + dtype + b"\x89" + data + b"t"
    make = b"cnumpy.core.multiarray\n_reconstruct\n"
    return torch_zip(repeated(make, state, b"q\x010)Rh\x01b"))


@refused
def long_integer() -> bytes:
    return torch_zip(b"\x8b" + struct.pack("<I", 1_000_000) + b"\x01" * 1_000_000 + b".")


@refused
def long_integer_as_a_size() -> bytes:
    return torch_zip(b"\x80\x02" + pid(numel=b"\x8b" + struct.pack("<I", 1_600) + b"\x01" * 1_600) + b".")


@refused
def long_integer_in_text() -> bytes:
    return torch_zip(b"I" + b"1" * 5_000_000 + b"\n.")


@refused
def long_float_in_text() -> bytes:
    return torch_zip(b"F" + b"x" * 5_000_000 + b"\n.")


@refused
def long_integer_of_another_base() -> bytes:
    return torch_zip(builtin("int") + text("f" * 5_000_000) + b"K\x10\x86R.")


@refused
def long_integer_as_a_key() -> bytes:
    """Python hashes an int anew each time."""
    key = b"\x8b" + struct.pack("<I", 1_600) + b"\x01" * 1_600
    return torch_zip(key + b"q\x00}" + b"h\x00Ns" * 300_000 + b".")


@refused
def text_of_a_tree() -> bytes:
    return torch_zip(builtin("str") + DAG + b"\x85R.")


@refused
def number_of_a_tree() -> bytes:
    return torch_zip(builtin("complex") + DAG + b"\x85R.")


@refused
def persistent_id_is_a_tree() -> bytes:
    return torch_zip(DAG + b"Q.")


@refused
def storage_key_is_a_tree() -> bytes:
    return torch_zip(pid(key=DAG) + b".")


@refused
def location_is_a_tree() -> bytes:
    return torch_zip(pid(place=DAG) + b".")


@refused
def numel_is_a_tree() -> bytes:
    return torch_zip(pid(numel=DAG) + b".")


@refused
def size_is_a_tree() -> bytes:
    return torch_zip(tensor(DAG, ints(1)) + b".")


@refused
def size_is_of_trees() -> bytes:
    return torch_zip(tensor(DAG + b"\x85", ints(1)) + b".")


@refused
def dtype_is_a_tree() -> bytes:
    return torch_zip(b"ctorch._utils\n_rebuild_tensor_v3\n(" + pid() + num(0) + ints(1) * 2 + b"\x89N" + DAG + b"tR.")


@refused
def codec_is_a_tree() -> bytes:
    return torch_zip(b"c_codecs\nencode\n" + text("a") + DAG + b"\x86R.")


@refused
def global_is_a_tree() -> bytes:
    return torch_zip(DAG + text("a") + b"\x93.")


@refused
def key_is_a_tree() -> bytes:
    return torch_zip(b"}" + DAG + b"Ns.")


@refused
def key_of_a_stub_is_a_tree() -> bytes:
    return torch_zip(b"cx\ny\n)R" + DAG + b"Ns.")


@refused
def member_is_a_tree() -> bytes:
    return torch_zip(b"\x8f(" + DAG + b"\x90.")


@refused
def frozen_member_is_a_tree() -> bytes:
    return torch_zip(b"(" + DAG + b"\x91.")


@refused
def member_of_a_made_set_is_a_tree() -> bytes:
    return torch_zip(builtin("set") + b"]" + DAG + b"a\x85R.")


@refused
def key_of_a_pair_is_a_tree() -> bytes:
    return torch_zip(b"ccollections\nOrderedDict\n](" + DAG + b"N\x86e\x85R.")


@refused
def keys_are_deep() -> bytes:
    return torch_zip(b"}" + DEEP + b"Ns.")


@refused
def members_are_deep() -> bytes:
    return torch_zip(builtin("frozenset") + b"(" + DEEP + b"t\x85R.")


@refused
def large_keys_again_and_again() -> bytes:
    return torch_zip(b"(" + b"N" * 900 + b"tq\x00}" + b"h\x00Ns" * 100_000 + b".")


@refused
def keys_that_collide() -> bytes:
    """Python's ints are hashed modulo 2**61 - 1."""
    return torch_zip(b"}(" + b"".join(num(k * ((1 << 61) - 1) + 7) + b"N" for k in range(1, 20_000)) + b"u.")


@refused
def members_that_collide() -> bytes:
    return torch_zip(b"\x8f(" + b"".join(num(k * ((1 << 61) - 1) + 7) for k in range(1, 20_000)) + b"\x90.")


@refused
def complex_keys_that_collide() -> bytes:
    make = b"".join(
        b"h\x00G" + struct.pack(">d", -1_000_003 * k) + b"G" + struct.pack(">d", k) + b"\x86RN"
        for k in range(1, 20_000)
    )
    return torch_zip(builtin("complex") + b"q\x000}(" + make + b"u.")


@refused
def many_classes() -> bytes:
    return torch_zip(b"".join(b"cm\nc%d\n0" % i for i in range(50_000)) + b"N.")


@refused
def bytes_that_are_claimed() -> bytes:
    return torch_zip(b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.")


@refused
def text_that_is_claimed() -> bytes:
    return torch_zip(b"\x8d" + struct.pack("<Q", (1 << 64) - 1) + b"x.")


@refused
def integer_that_is_claimed() -> bytes:
    return torch_zip(b"\x8b" + struct.pack("<I", (1 << 31) - 1) + b"x.")


@refused
def frame_that_is_claimed() -> bytes:
    return torch_zip(b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.")


@refused
def sizes_past_64_bits() -> bytes:
    return torch_zip(tensor(ints(1 << 40, 1 << 40), ints(0, 0)) + b".")


@refused
def sizes_past_64_bits_of_an_empty_tensor() -> bytes:
    return torch_zip(tensor(ints(1 << 40, 1 << 40, 0), ints(0, 0, 0)) + b".")


@refused
def stride_past_64_bits() -> bytes:
    return torch_zip(tensor(ints(1, 1), ints(1 << 61, 1)) + b".")


@refused
def too_many_dimensions() -> bytes:
    return torch_zip(tensor(ints(*[1] * 100_000), ints(*[1] * 100_000)) + b".")


@refused
def storage_larger_than_its_record() -> bytes:
    return torch_zip(tensor(ints(1 << 50), ints(1), storage=pid(numel=num(1 << 50))) + b".")


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


@read
def arrays_beside_a_large_memo() -> bytes:
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"
    state = b"(K\x01" + ints(1) + dtype + b"\x89C\x01xt"
    memo = b"".join(b"Nr" + struct.pack("<I", i) + b"0" for i in range(100, 40_000))
    make = b"cnumpy.core.multiarray\n_reconstruct\n"
    return torch_zip(memo + repeated(make, state, b"q\x010)Rh\x01b0", 20_000)[2:])


@read
def deep_lists() -> bytes:
    return torch_zip(b"]" * 300_000 + b"a" * 299_999 + b".")


@read
def deep_tuples() -> bytes:
    return torch_zip(DEEP + b".")


@read
def deep_objects() -> bytes:
    return torch_zip(b"cx\ny\nq\x000" + b"h\x00" * 100_000 + b"N" + b"\x85R" * 100_000 + b".")


@read
def doubling_lists() -> bytes:
    return torch_zip(b"]" + b"q\x00]h\x00ah\x00a" * 60 + b".")


@read
def doubling_tuples() -> bytes:
    return torch_zip(DAG + b".")


@read
def list_within_itself() -> bytes:
    return torch_zip(b"]q\x00h\x00a.")


@read
def one_tensor_of_endless_rows() -> bytes:
    return torch_zip(tensor(ints(1 << 50), ints(0)) + b".")


@read
def calls_within_calls() -> bytes:
    """Any of them could be a module that another wraps: each must be looked at once."""
    shared = b"cx\ny\nq\x00)Rq\x01" + b"".join(
        b"h\x00(" + b"h%c" % level * 8 + b"tRq%c" % (level + 1) for level in range(1, 5)
    )
    return torch_zip(b"](" + shared + (b"h\x00(" + b"h\x05" * 8 + b"tR") * 20_000 + b"e.")


@read
def calls_that_share_large_arguments() -> bytes:
    """Any of them could hold a module's state."""
    large = b"}(" + b"".join(text(str(i)) + b"]" for i in range(2_000)) + b"uq\x00"
    return torch_zip(b"](" + large + b"cx\ny\nq\x01" + b"h\x01h\x00\x85R" * 20_000 + b"e.")


@read
def many_marks() -> bytes:
    return torch_zip(b"(" * 300_000 + b"t" * 300_000 + b".")


_MEMBERS = b"\x8f(" + b"".join(map(num, range(9_000))) + b"\x90"


@read
def set_in_many_places() -> bytes:
    return torch_zip(b"\x80\x04]" + _MEMBERS + b"\x940(" + b"h\x00" * 90_000 + b"e.")


@read
def set_in_an_object_in_many_places() -> bytes:
    state = b"}" + text("a") + _MEMBERS + b"sb"
    return torch_zip(b"\x80\x04](cx\ny\n)\x81" + state + b"\x940h\x00" + b"h\x00" * 30_000 + b"e.")


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
_DATA = (
    b"(K\x01" + ints(9_000) + b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R\x89B" + struct.pack("<I", 9_000) + bytes(9_000) + b"t"
)


@read
def array_in_many_places() -> bytes:
    return torch_zip(b"\x80\x02" + _ARRAY + b")R" + _DATA + b"bq\x000](K\x01" + b"h\x00" * 90_000 + b"e.")


@read
def arrays_of_the_same_bytes() -> bytes:
    make = b"\x80\x02" + _ARRAY + b"q\x000" + _DATA + b"q\x010](K\x01"
    return torch_zip(make + b"h\x00)Rh\x01b" * 20_000 + b"e.")


@read
def long_key_at_every_depth() -> bytes:
    """Each path has the keys of all that lies above."""
    down = b"}(h\x00" * 350 + tensor(ints(4), ints(1))
    return torch_zip(
        b"\x80\x02" + text("k" * 20_000) + b"q\x000" + down + b"".join(text(f"a{i}") + b"Nu" for i in range(350)) + b"."
    )


@read
def long_key_above_many() -> bytes:
    return torch_zip(b"}" + text("k" * 1_000_000) + b"](" + b"K\x01" * 50_000 + b"es.")


@read
def views_of_a_deflated_storage() -> bytes:
    """Each would inflate it anew."""
    numel = 1 << 23
    one = (text(f"t{i}") + tensor(ints(9), ints(1), num(numel - 9 - i), pid(numel=num(numel))) for i in range(200))
    return torch_zip(b"}(" + b"".join(one) + b"u.", bytes(4 * numel), zipfile.ZIP_DEFLATED)
