"""Write safetensors: the header, then the data as it comes. The format is described in `safetensors_reader`."""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import BinaryIO

from convert.files.records import DTYPE_WIDTHS
from convert.files.safetensors_reader import DTYPES

NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
LATE_CHARACTERS = 64  # of a text that is known last: a sha256 in hex digits
ALIGNMENT = 64  # of the data, so that large tensors in it can be used as they lie in a mapping


def write_safetensors(
    out: BinaryIO,
    entries: Mapping[str, tuple[str, Sequence[int]]],
    data: Iterable[memoryview],
    metadata: Mapping[str, str | Callable[[], str]],
) -> None:
    """Write a whole file.

    entries   dtype, a key of DTYPE_WIDTHS, and shape of each tensor, by its name
    data      the bytes of each, row by row, in the same order
    metadata  by its name a text, or a function that returns one of LATE_CHARACTERS plain characters; it is called
              once all data is written, and its text put in its place in the header
    """
    late = {name: text for name, text in metadata.items() if callable(text)}
    written = write_header(out, entries, {**metadata, **dict.fromkeys(late, "0" * LATE_CHARACTERS)})
    for piece in data:
        out.write(piece)
    if late:
        found = {name: text() for name, text in late.items()}
        out.seek(0)
        assert write_header(out, entries, {**metadata, **found}) == written
        out.seek(0, os.SEEK_END)


def write_header(out: BinaryIO, entries: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> int:
    """Write the length and the header. Returns how many bytes that took."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + prod(shape) * DTYPE_WIDTHS[dtype]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    out.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)
