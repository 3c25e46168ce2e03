"""The numbers of a tensor in a mapped file, with numpy alone, row by row, in pieces.

The memory for a piece depends neither on the size of the tensor nor on its strides.
"""

from collections.abc import Iterator

import numpy as np

from convert.files.reader import CheckpointFile
from convert.files.records import DTYPE_WIDTHS, TensorRecord

PIECE = 1 << 20  # elements
NUMPY = {
    **{"float64": "<f8", "float32": "<f4", "float16": "<f2", "complex128": "<f8", "complex64": "<f4"},
    **{"complex32": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1", "bool": "u1"},
    **{"uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "u1"},
}


def raw_pieces(file: CheckpointFile, record: TensorRecord) -> Iterator[np.ndarray]:
    """The elements of a tensor as unsigned integers of their width, little-endian, in row-major order.

    Each piece has one axis and at most PIECE elements, and is only valid until the next one. A complex number is two.
    The checksum is not verified: see `CheckpointFile.verify`.
    """
    if record.numel == 0:
        return
    width, shape, stride, offset = DTYPE_WIDTHS[record.dtype], record.shape, record.stride, record.offset
    if record.dtype.startswith("complex"):
        width, offset = width // 2, offset * 2
        shape, stride = (*shape, 2), (*(2 * step for step in stride), 1)
    order = ">" if record.storage.byteorder == "big" else "<"
    array = np.ndarray(
        shape,
        dtype=f"{order}u{width}",
        buffer=file.storage_bytes(record),
        offset=offset * width,
        # the stride of an axis of length 1 does not matter
        strides=tuple(step * width if size > 1 else 0 for size, step in zip(shape, stride, strict=True)),
    )
    if array.size == 1:  # NumPy before 2.3 gives back freed memory for a buffered single element
        yield array.astype(f"<u{width}").reshape(1)
        return
    yield from np.nditer(
        array,
        flags=["external_loop", "buffered"],
        op_flags=[["readonly", "contig", "aligned"]],
        op_dtypes=[f"<u{width}"],
        order="C",
        casting="equiv",
        buffersize=PIECE,
    )


def in_step(first: Iterator[np.ndarray], second: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pieces of two tensors of equal size, cut into pairs of equal length."""
    a = b = np.empty(0)
    while True:
        a = next(first, None) if len(a) == 0 else a
        b = next(second, None) if len(b) == 0 else b
        if a is None or b is None:
            assert a is b, "tensors of one shape, and not as many numbers"
            return
        length = min(len(a), len(b))
        yield a[:length], b[:length]
        a, b = a[length:], b[length:]


def decoded(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Decode a raw piece: floats of at least their precision, or integers.

    dtype  a key of DTYPE_WIDTHS
    """
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.astype("<u4") << 16).view("<f4")
    if dtype.startswith("float8"):
        return FLOAT8[dtype][raw]
    return raw.view(NUMPY[dtype])


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values to the nearest that a floating-point dtype of 8 to 64 bits has, as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            return _to_bfloat16(values).astype("f8")
        if not dtype.startswith("float8"):
            return values.astype(NUMPY[dtype]).astype("f8")
        steps = np.unique(FLOAT8[dtype][np.isfinite(FLOAT8[dtype])].astype("f8"))
        above = np.clip(np.searchsorted(steps, values), 1, len(steps) - 1)
        low, high = steps[above - 1], steps[above]
        return np.where(values - low <= high - values, low, high)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, on the bits of a float32; NaN stays NaN."""
    single = values.astype("<f4")
    bits = single.view("<u4")
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(single), single, kept.view("<f4"))


def _float8(exponent_bits: int, bias: int, special: str) -> np.ndarray:
    """All 256 values of an 8-bit float, by its bits.

    special  "ieee": the largest exponent is infinity and NaN; "fn": only all ones is NaN, there is no infinity;
             "fnuz": only what would be minus zero is NaN

    Micikevicius et al., "FP8 Formats for Deep Learning" (2022), table 1; for fnuz Noune et al. (2022), section 3.
    """
    mantissa_bits = 7 - exponent_bits
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    scale = 2.0 ** (np.maximum(exponent, 1) - bias)
    values = sign * np.where(exponent > 0, 1 + fraction, fraction) * scale
    if special == "ieee":
        largest = exponent == 2**exponent_bits - 1
        values = np.where(largest, np.where(fraction == 0, sign * np.inf, np.nan), values)
    elif special == "fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[0x80] = np.nan
    return values.astype("<f4")


FLOAT8 = {
    "float8_e4m3fn": _float8(4, 7, "fn"),
    "float8_e4m3fnuz": _float8(4, 8, "fnuz"),
    "float8_e5m2": _float8(5, 15, "ieee"),
    "float8_e5m2fnuz": _float8(5, 16, "fnuz"),
    "float8_e8m0fnu": np.append(2.0 ** np.arange(-127, 128), np.nan).astype("<f4"),  # an exponent alone
}


def number_in(file: CheckpointFile, record: TensorRecord) -> float | None:
    """The one number in a tensor, its checksum verified; None for tensors with none or several, and complex ones."""
    if record.numel != 1 or record.dtype.startswith("complex"):
        return None
    file.verify(record)
    (raw,) = raw_pieces(file, record)
    return float(decoded(raw, record.dtype)[0])
