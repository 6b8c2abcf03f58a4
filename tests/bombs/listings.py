"""Objects that are small to read and endless to list, deep ones, cycles."""

from __future__ import annotations

import struct
import zipfile

from bombs.making import DAG, DEEP, ints, num, pid, read, repeated, tensor, text, torch_zip


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


@read
def tensors_below_a_long_key() -> bytes:
    held = b"}(" + b"".join(text(f"t{i}") + tensor(ints(1), ints(1)) for i in range(4_000)) + b"u"
    return torch_zip(b"\x80\x02}" + text("k" * 1_000_000) + held + b"s.")


@read
def keys_of_long_texts() -> bytes:
    """Each key is 900 times the same text: spelt out, they have a gigabyte."""
    keys = (num(i) + b"h\x00" * 900 + b"t" for i in range(12))
    return torch_zip(
        b"\x80\x02" + text("\x01" * 100_000) + b"q\x000}(" + b"".join(b"(" + k + b"N" for k in keys) + b"u."
    )


@read
def modules_of_long_names() -> bytes:
    """Both the names of modules and of their attributes, each in many places."""
    name = b"(" + b"h\x00" * 900 + b"t"
    inner = b"cx\nM\n)\x81}(" + text("_parameters") + b"}" + text("_modules") + b"}" + name + b"K\x01ub"
    children = b"".join(name + inner for _ in range(10))
    outer = b"cx\nM\n)\x81}(" + text("_parameters") + b"}" + text("_modules") + b"}(" + children + b"uub"
    return torch_zip(b"\x80\x02" + text("\x01" * 100_000) + b"q\x000" + outer + b".")


@read
def long_label_in_many_places() -> bytes:
    return torch_zip(b"\x80\x02](}" + text("k" * 1_000_000) + b"Nsq\x00" + b"h\x00" * 50_000 + b"e.")
