"""Embeddings inside pictures, as the web UI shares them.

In a PNG, the text chunk "sd-ti-embedding" holds them: JSON in base64. In other formats, and where programs have dropped
the chunk, the same JSON, compressed with zlib, is in the low four bits of the colours beside the picture:

    columns   | left block | black | picture | black | right block |
    low bits  | low halves |   0   |         |   0   | high halves |   of the bytes, row by row, R G B

Each block is combined (exclusive or) with the numbers of a linear congruential generator. Files are untrusted: what
comes out of compression and of JSON is limited.

AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion/image_embedding.py.
"""

import base64
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import (
    CheckpointError,
    CorruptFileError,
    UnsafeFileError,
    UnsupportedFileError,
    WeightMismatchError,
    shown,
)
from convert.files.limits import check_limit

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

CHUNK = "sd-ti-embedding"
MOST_PIXELS = 16 << 20  # of a picture that is searched; the web UI's cards have less than a million
MOST_JSON = 16 << 20  # bytes: 75 vectors for both text encoders of XL take 4 million
FORMATS = ("PNG", "WEBP", "AVIF")
STARTS = (b"\x89PNG\r\n\x1a\n", b"RIFF")

# What Pillow raises for damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, RuntimeError)
DAMAGE += (struct.error, zlib.error, AssertionError)


def is_picture(path: Path) -> bool:
    """Whether a file begins as one of FORMATS does."""
    try:
        if not path.is_file():  # a pipe would have to be waited for
            return False
        with open(path, "rb") as file:
            start = file.read(16)
    except (OSError, ValueError):
        return False  # reported when it is opened as a checkpoint
    return start.startswith(STARTS) or start[4:12] in (b"ftypavif", b"ftypavis")


def read_card(path: Path) -> dict | None:
    """The embedding in a picture, as plain data with arrays; None if there is none.

    Raises CorruptFileError for a damaged picture, other CheckpointErrors for what is in it and no embedding.
    """
    from PIL import Image

    if not is_picture(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=available(FORMATS)) as picture:
                data = data_in(picture)
    except CheckpointError:
        raise
    except (*DAMAGE, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0][:100].rstrip(".") or type(error).__name__
        raise CorruptFileError(f"is a picture that cannot be read: {shown(reason)}") from None
    return None if data is None else decoded(data)


def data_in(picture: "Image.Image") -> bytes | None:
    """The JSON in a picture that was opened with Pillow."""
    text = picture.info.get(CHUNK) if picture.format == "PNG" else None
    if text is None and picture.width * picture.height > MOST_PIXELS:
        return None  # no card
    if text is None and picture.format == "PNG":
        text = picture.text.get(CHUNK)  # also behind the pixels
    if text is None:
        return from_pixels(picture)
    try:
        return base64.b64decode(text)
    except ValueError:
        raise CorruptFileError(f"has a text {CHUNK} that is not base64") from None


def available(formats: tuple[str, ...]) -> list[str]:
    from PIL import Image

    Image.init()  # only then does Image.OPEN have all of them
    return [name for name in formats if name in Image.OPEN]


def from_pixels(picture: "Image.Image") -> bytes | None:
    """The bytes that are hidden in the colours; None if there are none."""
    import numpy as np

    colours = np.asarray(picture.convert("RGB"))
    lit = (colours > 0).all(axis=2)
    columns, rows = np.flatnonzero(lit.any(axis=0)), np.flatnonzero(lit.any(axis=1))
    if not len(columns):
        return None
    low = colours[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~low.any(axis=(0, 2)))
    if len(black) < 2:
        return None
    left, right = low[:, : black[0]], low[:, black[-1] + 1 :]
    if left.shape != right.shape or not left.size:
        return None
    stored = ((combined(right) << 4) | combined(left)).tobytes()
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(stored, MOST_JSON + 1)
    except zlib.error:
        return None  # a picture that happens to have black columns
    check_limit("bytes of its embedding", len(data), MOST_JSON, UnsafeFileError)
    return data if unpack.eof else None


def combined(block: "np.ndarray") -> "np.ndarray":
    """The block's half bytes, exclusive or the generator's: s <- (1664525 s + 1013904223) mod 2^32, of each s mod 255.

    The generator begins at 0. Its n-th number is A s + C for constants A and C, so all are computed by doubling.
    """
    import numpy as np

    numbers = np.array([1013904223], dtype=np.uint64)  # s after one step
    factor, added = 1664525, 1013904223  # of as many steps at once as there are numbers
    while len(numbers) < block.size:
        numbers = np.concatenate([numbers, (numbers * np.uint64(factor) + np.uint64(added)) % np.uint64(1 << 32)])
        factor, added = factor * factor % 2**32, (factor * added + added) % 2**32
    stream = (numbers[: block.size] % np.uint64(255)).astype(np.uint8) & 0x0F
    return block.astype(np.uint8) ^ stream.reshape(block.shape)


def decoded(data: bytes) -> dict:
    """What the JSON says, tensors as arrays (n, D) or (D,). Raises CheckpointError."""
    check_limit("bytes of its embedding", len(data), MOST_JSON, UnsafeFileError)

    def with_tensors(entries: dict) -> object:
        return array_of(entries["TORCHTENSOR"]) if "TORCHTENSOR" in entries else entries

    try:
        root = json.loads(data, object_hook=with_tensors)
    except CheckpointError:
        raise
    except ValueError:  # also of a text that is not UTF-8, and a number of thousands of digits
        raise CorruptFileError("holds an embedding that is not JSON") from None
    except RecursionError:
        raise UnsafeFileError("holds an embedding whose JSON is nested too deeply") from None
    if not isinstance(root, dict):
        raise UnsupportedFileError("holds JSON without an embedding")
    return root


def array_of(rows: object) -> "np.ndarray":
    """A list of numbers, or of such lists, as float32. Raises WeightMismatchError for anything else."""
    import numpy as np

    flat = isinstance(rows, list) and not any(isinstance(row, list) for row in rows)
    table = [rows] if flat else rows
    is_table = isinstance(table, list) and all(isinstance(row, list) for row in table)
    if not is_table or any(type(number) not in (int, float) for row in table for number in row):
        raise WeightMismatchError("holds an embedding whose tensor is not a table of numbers")
    if len({len(row) for row in table}) > 1:
        raise WeightMismatchError("holds an embedding whose vectors have different lengths")
    try:
        with np.errstate(over="ignore"):  # infinite, which is reported
            return np.array(rows, dtype="f8").astype("f4")
    except OverflowError:  # a whole number beyond all floats
        raise WeightMismatchError("holds numbers that are NaN or infinite. It is damaged: get it again") from None
