"""PNG files without what no pixel depends on, since Pillow refuses a whole picture for one long or damaged text in it.

The chunks are those of the PNG specification, third edition, chapter 11.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED = {b"tRNS", b"eXIf", b"fcTL", b"fdAT"}  # of those that a reader may ignore: names in small letters
TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
ORIENTATIONS = {b"XML:com.adobe.xmp", b"Raw profile type exif"}  # texts that may say which side is up
LONGEST_TEXT = 2**20  # bytes of a compressed text when unpacked: Pillow's limit
ALL_TEXTS = 2**26  # bytes of all texts together: Pillow's, too
LARGEST_PROFILE = 2**24  # bytes of a colour profile when unpacked


@dataclass(frozen=True)
class SlimPng:
    """A PNG that Pillow reads, and what was taken out of it.

    file      the PNG, from its start
    profile   its colour profile, or None
    depth     bits a channel, of the file
    too_long  the names of the texts that are too long to be read
    """

    file: BinaryIO
    profile: bytes | None
    depth: int
    too_long: tuple[str, ...]

    def opened(self) -> Image.Image:
        """The picture, as from Image.open, with its transparent level in 8 bits. Raises what Pillow raises."""
        picture = Image.open(self.file, formats=["PNG"])
        if self.profile:
            picture.info["icc_profile"] = self.profile
        clear = picture.info.get("transparency")  # Pillow leaves it as it stands in the file, and scales the pixels
        if picture.mode == "L" and self.depth < 8 and isinstance(clear, int):
            picture.info["transparency"] = clear * 255 // (2**self.depth - 1)
        elif self.depth == 16 and isinstance(clear, tuple):
            picture.info["transparency"] = tuple(level >> 8 for level in clear)
        return picture


def png_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height of a PNG, None of another file; the file stands at its start again."""
    start = file.read(24)
    file.seek(0)
    is_png = len(start) == 24 and start.startswith(SIGNATURE + b"\0\0\0\x0dIHDR")
    return struct.unpack(">II", start[16:]) if is_png else None


def slim(file: BinaryIO, *, with_texts: bool = False) -> SlimPng:
    """The PNG without its colour profile, and without chunks that do not change how it looks.

    with_texts  keep the texts, as far as they are not too long
    """
    width, height = png_size(file) or (0, 0)
    room, pixels_room = ALL_TEXTS, 9 * width * height + 2**20  # at most 64 bits a pixel, hardly compressed
    kept, profile, depth, too_long = io.BytesIO(), None, 8, []
    kept.write(SIGNATURE)
    for kind, chunk in _chunks(file):
        data = chunk[8:-4]
        if kind == b"iCCP":
            profile = _inflated(data.partition(b"\0")[2][1:], LARGEST_PROFILE)
        elif kind in TEXTS:
            name = data.partition(b"\0")[0]
            if not with_texts and name not in ORIENTATIONS:
                continue
            size = _text_size(kind, data)
            if size is None or size > room:
                too_long.append(name.decode("latin-1")[:79])
            elif size:
                kept.write(chunk)
                room -= size
        elif kind[:1].isupper() or kind in NEEDED or (kind == b"acTL" and len(data) == 8):
            if kind == b"IHDR" and len(data) == 13:
                depth = data[8]
            if kind == b"IDAT":
                pixels_room -= len(data)
            if pixels_room >= 0:
                kept.write(chunk)
    kept.seek(0)
    return SlimPng(kept, profile, depth, tuple(too_long))


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The kind of each chunk, and all of it, as far as the file goes; none after the end of the picture."""
    end = file.seek(0, os.SEEK_END)
    place = file.seek(8)
    while header := file.read(8):
        place += len(header)
        length = min(int.from_bytes(header[:4], "big") + 4, end - place)
        place += length
        yield header[4:], header + file.read(length)
        if header[4:] == b"IEND":
            return


def _inflated(data: bytes, limit: int) -> bytes | None:
    """What is compressed there: empty if it is damaged, None if it is longer than the limit."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, limit)
    except zlib.error:
        return b""
    return None if stream.unconsumed_tail else found


def _text_size(kind: bytes, data: bytes) -> int | None:
    """How many bytes a text has when unpacked; None if that is too many, 0 if the text is damaged."""
    rest = data.partition(b"\0")[2]
    if kind == b"zTXt":
        method, packed = rest[:1], rest[1:]
    elif kind == b"iTXt" and rest[:1] != b"\0":
        method, packed = rest[1:2], rest[2:].split(b"\0", 2)[-1]
    else:
        return len(data)
    found = _inflated(packed, LONGEST_TEXT) if method == b"\0" else b""
    return None if found is None else len(found)
