"""Safetensors: the length of a JSON header (8 bytes, little-endian), the header, then the data of all tensors.

The header says for each tensor dtype, shape and the span of its bytes, counted from the end of the header. The spans
cover the data exactly, in any order. A header that says otherwise is damaged, one that says something twice is hostile.
Old writers did not align, new ones pad the header with spaces.
https://github.com/huggingface/safetensors, section "Format"
"""

import json
import re
from math import prod

from convert.errors import CorruptFileError, UnsafeFileError, UnsupportedFileError, part_text, shown, size_text
from convert.files.limits import LIMITS, check_limit
from convert.files.records import DTYPE_WIDTHS, Contents, StorageRecord, TensorRecord

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
ENTRY = {"dtype", "shape", "data_offsets"}
NESTING = 3  # header, entry, shape
STRING_OR_BRACKET = re.compile(rb'"[^"]*"|[][{}]')


def is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return 2 <= length < 2**32 and head[8:9] == b"{"


def read_safetensors(data: memoryview) -> Contents:
    """Read and check the header; the data is only located."""
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if start > len(data):
        raise CorruptFileError(f"ends after {size_text(len(data))}, inside its header of {size_text(length)}")
    check_limit("bytes of the safetensors header", length, LIMITS.header_bytes)
    header = parse_header(bytes(data[8:start]))
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if type(metadata) is not dict or not all(map(is_text, (*metadata, *metadata.values()))):
        raise CorruptFileError("has safetensors metadata that is not text")
    check_limit("tensors", len(header), LIMITS.tensors)
    root = {name: read_entry(name, entry, start) for name, entry in header.items()}
    check_cover([record.storage for record in root.values()], start, len(data))
    return Contents("safetensors", root, metadata)


def parse_header(raw: bytes) -> dict:
    """JSON with no duplicate keys, no numbers but plain integers, no more nesting than a header needs.

    It starts with a brace (`is_safetensors` has looked), so what comes out is a dict.
    """
    without_escapes = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = 0
    for count, token in enumerate(STRING_OR_BRACKET.finditer(without_escapes)):
        check_limit("strings and brackets in the safetensors header", count, LIMITS.header_tokens)
        if token[0] in b"[{":
            depth += 1
            if depth > NESTING:
                raise CorruptFileError(f"has a safetensors header with more than {NESTING} brackets inside each other")
        elif token[0] in b"]}":
            depth -= 1
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=small_integer,
            parse_float=no_number,
            parse_constant=no_number,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CorruptFileError("has a safetensors header that is not JSON") from None


def is_text(value: object) -> bool:
    """Whether it is text that can be written again: JSON can spell half a surrogate pair, Unicode text has none."""
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


def unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise UnsafeFileError("has a safetensors header with the same name twice")
    return result


def small_integer(digits: str) -> int:
    if len(digits) > 19:
        raise CorruptFileError("has a safetensors header with a number out of range")
    return int(digits)


def no_number(text: str) -> None:
    raise CorruptFileError(f"has a safetensors header with the number {shown(text, 20)}, which is not an integer")


def read_entry(name: str, entry: object, start: int) -> TensorRecord:
    weight = f"weight '{shown(name)}'"
    if not name or not name.isprintable():
        raise UnsafeFileError(f"has a weight whose name is not printable: '{shown(name)}'")
    if type(entry) is not dict or entry.keys() != ENTRY:
        raise CorruptFileError(f"has an entry with other fields than dtype, shape and data_offsets: {weight}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise UnsupportedFileError(f"has a {weight} of the unknown dtype '{shown(str(dtype), 20)}'")
    if type(shape) is not list or type(span) is not list or len(span) != 2:
        raise CorruptFileError(f"has an entry with a malformed shape or span: {weight}")
    check_limit(f"dimensions of {weight}", len(shape), LIMITS.dimensions)
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *span)):
        raise CorruptFileError(f"has an entry with numbers out of range: {weight}")
    nbytes = span[1] - span[0]
    if nbytes != prod(shape) * DTYPE_WIDTHS[DTYPES[dtype]]:
        raise CorruptFileError(f"has an entry whose span of {nbytes} bytes does not go with its shape: {weight}")
    stride = tuple(prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
    if max(stride, default=0) >= 2**63:  # of a tensor without elements
        raise CorruptFileError(f"has an entry with numbers out of range: {weight}")
    storage = StorageRecord(name, start + span[0], nbytes, "little", crc=None)
    return TensorRecord(DTYPES[dtype], tuple(shape), stride, storage, 0)


def check_cover(spans: list[StorageRecord], start: int, size: int) -> None:
    """The spans must cover the data without hole, overlap or remainder."""
    position = start
    for span in sorted(spans, key=lambda span: (span.offset, span.nbytes)):
        if span.offset != position:
            fault = "overlap" if span.offset < position else "leave a hole"
            raise CorruptFileError(f"has weights whose spans {fault}: before weight '{shown(span.key)}'")
        position += span.nbytes
    if position > size:
        raise CorruptFileError(f"ends after {part_text(size, position)} that its header announces")
    if position < size:
        raise CorruptFileError(f"has {size_text(size - position)} more than its header announces")
