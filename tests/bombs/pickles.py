"""Pickles that copy, hash, count or claim without end."""

from __future__ import annotations

import struct

from bombs.making import (
    DAG,
    DEEP,
    FLOATS,
    NUMBERS,
    PAIRS,
    REBUILD,
    builtin,
    ints,
    num,
    pid,
    read,
    refused,
    repeated,
    tensor,
    text,
    torch_zip,
)  # fmt: skip


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
def a_key_behind_a_chain_of_others() -> bytes:
    """Its lookup ends nowhere but at the end of a chain that the other keys fill; it is set over and over."""
    held = b"".join(b"J" + struct.pack("<i", place) + b"N" for place in _chain())
    again = b"h\x00N" * 100_000
    return torch_zip(num(8_641_048_420) + b"q\x000}(" + held + b"u(h\x00N" + again + b"u.")


def _chain() -> list[int]:
    """Small integers in the order in which a dict with 65,536 places looks for a free one."""
    places = [0]
    while len(places) < 43_688:
        places.append((places[-1] * 5 + 1) & 0xFFFF)
    return places


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


def _row(number: int, first: int, sizes: bytes = b"K\x01\x85") -> bytes:
    """A name and a tensor as torch writes them, their places in the memo from `first` on."""
    p = [b"r" + struct.pack("<I", first + place) for place in range(8)]
    return (
        text(f"row{number}") + p[0] + b"h\x02((h\x03h\x04" + text("0") + p[1] + b"h\x06K\x01t" + p[2] + b"QK\x00"
        + sizes + p[3] + b"K\x01\x85" + p[4] + b"\x89h\x0a)R" + p[5] + b"t" + p[6] + b"R" + p[7]
    )  # fmt: skip


_FIRST_ROW = (
    b"\x80\x02}q\x00(" + text("first") + b"q\x01" + REBUILD + b"q\x02((" + text("storage") + b"q\x03" + FLOATS
    + b"q\x04" + text("0") + b"q\x05" + text("cpu") + b"q\x06K\x01tq\x07QK\x00K\x01\x85q\x08K\x01\x85q\x09\x89"
    + b"ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0d"
)  # fmt: skip


@read
def rows_of_which_each_puts_elsewhere() -> bytes:
    """A state dict as torch writes it, but for the places in the memo: what is read ahead is of no use."""
    return torch_zip(_FIRST_ROW + b"".join(_row(number, 300 + 100 * number) for number in range(8_000)) + b"u.")


@read
def rows_that_put_where_rows_have_put() -> bytes:
    """Many good rows, and then as many that all use the same old places."""
    good = b"".join(_row(number, 300 + 8 * number) for number in range(6_000))
    return torch_zip(_FIRST_ROW + good + b"".join(_row(6_000 + number, 300) for number in range(6_000)) + b"u.")


@read
def versions_that_put_where_versions_have_put() -> bytes:
    """The same of `{"version": 1}`."""
    rows = []
    for number in range(20_000):
        first = 300 + 2 * min(number, 10_000)
        puts = [b"r" + struct.pack("<I", first + place) for place in range(2)]
        rows.append(text(f"row{number}") + puts[0] + b"}" + puts[1] + b"h\x01K\x01s")
    return torch_zip(b"\x80\x02}q\x00(" + text("version") + b"q\x01N" + b"".join(rows) + b"u.")


@read
def counting_the_memo() -> bytes:
    """Many places that rows promise, and then their number asked for again and again."""
    rows = b"".join(_row(number, 14 + 8 * number) for number in range(6_000))
    return torch_zip(_FIRST_ROW + rows + b"N\x940" * 100_000 + b"u.")


@refused
def long_tuple_as_sizes_over_and_over() -> bytes:
    """Sizes out of the memo that no tensor has, in rows that differ in their offset."""
    rows = []
    for number in range(3_000):
        p = [b"r" + struct.pack("<I", 300 + 7 * number + place) for place in range(7)]
        rows.append(
            text(f"row{number}") + p[0] + b"h\x02((h\x03h\x04" + text("0") + p[1] + b"h\x06K\x01t" + p[2]
            + b"QM" + struct.pack("<H", number) + b"h\x20K\x01\x85" + p[3] + b"\x89h\x0a)R" + p[4] + b"t" + p[5]
            + b"R" + p[6]
        )  # fmt: skip
    long = b"(" + b"K\x00" * 300_000 + b"tq\x200"
    good = b"".join(_row(number, 30_000 + 8 * number) for number in range(3_000))
    return torch_zip(_FIRST_ROW + text("long") + long[:-1] + good + b"".join(rows) + b"u.")


@refused
def size_as_a_key() -> bytes:
    """A torch.Size is a tuple: hashing it visits all that it holds."""
    return torch_zip(b"\x80\x02}ctorch\nSize\n" + DAG + b"\x85RNs.")


@refused
def empty_sets() -> bytes:
    """Two hundred bytes for one, and for a thirtieth of one where the pickle is deflated."""
    return torch_zip(b"\x80\x04(" + b"\x8f" * 2_000_000 + b"t.")
