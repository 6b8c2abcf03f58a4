"""What is known of a stored tensor: dtype table, `Storage`, `TensorInfo`. No bytes, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anycard.disk.source import Source


class DType(NamedTuple):
    """One dtype of torch.

    Attributes:
        name: torch's name without `torch.`.
        itemsize: Bytes per element.
        kind: "float", "int", "bool", "complex" or "bits".
        storage: Class name of torch's typed storage (`FloatStorage`), or None where torch
            writes an untyped storage and the dtype beside it (`_rebuild_tensor_v3`).
        safetensors: Code in safetensors headers, or None where that format has none.
        numpy: numpy's dtype string for the values, or None where numpy lacks it.
    """

    name: str
    itemsize: int
    kind: str
    storage: str | None
    safetensors: str | None
    numpy: str | None


_ROWS = (
    DType("float64", 8, "float", "DoubleStorage", "F64", "<f8"),
    DType("float32", 4, "float", "FloatStorage", "F32", "<f4"),
    DType("float16", 2, "float", "HalfStorage", "F16", "<f2"),
    DType("bfloat16", 2, "float", "BFloat16Storage", "BF16", None),
    DType("int64", 8, "int", "LongStorage", "I64", "<i8"),
    DType("int32", 4, "int", "IntStorage", "I32", "<i4"),
    DType("int16", 2, "int", "ShortStorage", "I16", "<i2"),
    DType("int8", 1, "int", "CharStorage", "I8", "|i1"),
    DType("uint8", 1, "int", "ByteStorage", "U8", "|u1"),
    DType("bool", 1, "bool", "BoolStorage", "BOOL", "|b1"),
    DType("complex128", 16, "complex", "ComplexDoubleStorage", None, "<c16"),
    DType("complex64", 8, "complex", "ComplexFloatStorage", "C64", "<c8"),
    DType("complex32", 4, "complex", None, None, None),
    DType("uint16", 2, "int", None, "U16", "<u2"),
    DType("uint32", 4, "int", None, "U32", "<u4"),
    DType("uint64", 8, "int", None, "U64", "<u8"),
    DType("float8_e4m3fn", 1, "float", None, "F8_E4M3", None),
    DType("float8_e5m2", 1, "float", None, "F8_E5M2", None),
    DType("float8_e4m3fnuz", 1, "float", None, "F8_E4M3FNUZ", None),
    DType("float8_e5m2fnuz", 1, "float", None, "F8_E5M2FNUZ", None),
    DType("float8_e8m0fnu", 1, "float", None, "F8_E8M0", None),
    DType("float4_e2m1fn_x2", 1, "float", None, None, None),
    DType("quint8", 1, "bits", "QUInt8Storage", None, None),
    DType("qint8", 1, "bits", "QInt8Storage", None, None),
    DType("qint32", 4, "bits", "QInt32Storage", None, None),
    DType("quint4x2", 1, "bits", "QUInt4x2Storage", None, None),
    DType("quint2x4", 1, "bits", "QUInt2x4Storage", None, None),
    DType("bits8", 1, "bits", None, None, None),
    DType("bits16", 2, "bits", None, None, None),
    DType("bits1x8", 1, "bits", None, None, None),
    DType("bits2x4", 1, "bits", None, None, None),
    DType("bits4x2", 1, "bits", None, None, None),
    *(DType(f"{sign}int{bits}", 1, "bits", None, None, None) for sign in ("", "u") for bits in range(1, 8)),
)


def _scripted(name: str) -> str:
    """The storage class that TorchScript names where Python's torch has none (`UInt16Storage`)."""
    word = "ComplexHalf" if name == "complex32" else name.replace("uint", "UInt").replace("int", "Int")
    return f"{word[0].upper()}{word[1:]}Storage"


DTYPES: dict[str, DType] = {row.name: row for row in _ROWS}
BY_STORAGE: dict[str, DType] = {row.storage or _scripted(row.name): row for row in _ROWS}
BY_SAFETENSORS: dict[str, DType] = {row.safetensors: row for row in _ROWS if row.safetensors}
BY_NUMPY: dict[str, DType] = {row.numpy[1:]: row for row in _ROWS if row.numpy}


ARRAY = "array"  # key of the storage that holds a numpy array's inline bytes


class Sliceable(Protocol):
    """Bytes that are had by slices: in memory, or made when asked for."""

    def __getitem__(self, cut: slice, /) -> bytes | bytearray: ...


@dataclass(eq=False, slots=True)
class Storage:
    """A stretch of bytes that tensors are views of: in a file, or held inline by a pickle.

    Attributes:
        key: The storage's name in its file (`"17"`); names a record for people.
        nbytes: Size in bytes.
        device: The tag that the file carries (`"cuda:7"`).
        source: What the bytes are read from; None for inline data and for meta tensors.
        offset: Byte offset in the source, or None where the bytes do not lie there as they are.
        data: Inline bytes, or what inflates a compressed record's; None where they lie in the source.
        crc: CRC-32 of all bytes, or None.
        big_endian: Elements are stored most significant byte first.
        missing: Why the bytes cannot be had, or "".
    """

    key: str
    nbytes: int
    device: str = "cpu"
    source: Source | None = None
    offset: int | None = None
    data: Sliceable | None = None
    crc: int | None = None
    big_endian: bool = False
    missing: str = ""

    def settle(self) -> Storage:
        """Of a part of a file, the place in the file itself."""
        if self.source is not None and self.offset is not None:
            self.source, self.offset = self.source.origin(self.offset)
        return self


class Form:
    """All of a tensor but its bytes. A file has many tensors of few forms, and those of one form share it.

    Attributes:
        dtype: torch's name (`"float32"`).
        shape: Sizes.
        stride: Strides in elements.
        conj, neg: torch's lazy conjugate and negative bits.
        parameter: It was pickled as an `nn.Parameter`.
        requires_grad: As stored.
        nbytes: Bytes of the elements.
        span: Bytes from element 0 to the end of the last element.
        row_major: The elements are stored in row-major order without gaps.
    """

    __slots__ = (
        "conj", "dtype", "nbytes", "neg", "parameter", "requires_grad", "row_major", "shape", "span", "stride",
    )  # fmt: skip

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        *,
        conj: bool = False,
        neg: bool = False,
        parameter: bool = False,
        requires_grad: bool = False,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.stride = row_major(shape) if stride is None else stride
        self.conj = conj
        self.neg = neg
        self.parameter = parameter
        self.requires_grad = requires_grad
        itemsize = DTYPES[dtype].itemsize
        self.nbytes = math.prod(shape) * itemsize
        self.span = span_numel(shape, self.stride) * itemsize
        self.row_major = is_row_major(shape, self.stride)

    def replace(self, **changes: Any) -> Form:
        """The same with some attributes changed."""
        names = ("dtype", "shape", "stride", "conj", "neg", "parameter", "requires_grad")
        return form_of(**{name: changes.get(name, getattr(self, name)) for name in names})


form_of = lru_cache(maxsize=4096)(Form)


class TensorInfo:
    """A stored tensor: a view (dtype, shape, stride) of a `Storage`. Immutable by convention.

    Attributes:
        form: All that is known of it but where its bytes are.
        storage: The bytes that it is a view of; tied tensors share it.
        start: Byte offset of element 0 within the storage.
    """

    __slots__ = ("form", "start", "storage")

    def __init__(self, form: Form, storage: Storage, start: int = 0) -> None:
        self.form = form
        self.storage = storage
        self.start = start

    @property
    def dtype(self) -> str:
        """torch's name (`"float32"`)."""
        return self.form.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.form.shape

    @property
    def stride(self) -> tuple[int, ...]:
        """Strides in elements."""
        return self.form.stride

    @property
    def conj(self) -> bool:
        """torch's lazy conjugate bit."""
        return self.form.conj

    @property
    def neg(self) -> bool:
        """torch's lazy negative bit."""
        return self.form.neg

    @property
    def parameter(self) -> bool:
        """It was pickled as an `nn.Parameter`."""
        return self.form.parameter

    @property
    def requires_grad(self) -> bool:
        """As stored."""
        return self.form.requires_grad

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.form.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's own elements (not of its storage)."""
        return self.form.nbytes

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.form.dtype].itemsize

    @property
    def device(self) -> str:
        """The device tag that the file carries."""
        return self.storage.device

    @property
    def offset(self) -> int | None:
        """Byte offset of element 0 in `file`; None where the bytes do not lie there as they are."""
        return None if self.storage.offset is None else self.storage.offset + self.start

    @property
    def file(self) -> str | None:
        """The file that holds the bytes."""
        return None if self.storage.source is None else self.storage.source.name

    @property
    def is_array(self) -> bool:
        """It was pickled as a numpy array, which may be a weight or may be plain data beside the weights."""
        return self.storage.key == ARRAY

    @property
    def span(self) -> int:
        """Bytes from element 0 to the end of the last element, as stored."""
        return self.form.span

    @property
    def contiguous(self) -> bool:
        """Row-major without gaps."""
        return self.form.row_major

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for tied tensors: the same view of the same bytes."""
        form = self.form
        return id(self.storage), self.start, form.shape, form.stride, form.dtype, form.conj, form.neg

    def replace(self, *, storage: Storage | None = None, start: int | None = None, **changes: Any) -> TensorInfo:
        """A copy with some attributes changed."""
        form = self.form.replace(**changes) if changes else self.form
        return TensorInfo(form, storage or self.storage, self.start if start is None else start)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        return f"TensorInfo({self.dtype}, {size}, {self.device})"


TensorInfo.__module__ = "anycard"


@lru_cache(maxsize=4096)  # a model has many tensors of few shapes
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor, as torch gives them."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=4096)
def is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Elements lie in row-major order without gaps (strides of sizes 0 and 1 do not count)."""
    step = 1
    for size, have in zip(reversed(shape), reversed(stride), strict=True):
        if size == 0:
            return True
        if size != 1:
            if have != step:
                return False
            step *= size
    return True


@lru_cache(maxsize=4096)
def span_numel(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last, both included; 0 for an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


@lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Every element has its own place and there are no gaps, in whatever order of dimensions."""
    step = 1
    for have, size in sorted(pair for pair in zip(stride, shape, strict=True) if pair[1] != 1):
        if size == 0:
            return True
        if have != step:
            return False
        step *= size
    return True
