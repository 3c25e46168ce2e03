"""Safetensors: header and data, written as the bytes come. The format is described in `safetensors_reader`."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import BinaryIO

from convert.records import DTYPE_WIDTHS
from convert.safetensors_reader import DTYPES

NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
ALIGNMENT = 64  # of the data, so that large tensors in it can be used as they lie in a mapping


def write_safetensors(
    out: BinaryIO,
    entries: Mapping[str, tuple[str, Sequence[int]]],
    data: Iterable[memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Write a whole file.

    entries  dtype, a key of DTYPE_WIDTHS, and shape of each tensor, by its name
    data     the bytes of each, row by row, in the same order
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + prod(shape) * DTYPE_WIDTHS[dtype]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    out.write(struct.pack("<Q", len(text)) + text)
    for piece in data:
        out.write(piece)
