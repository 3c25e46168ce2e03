"""Pictures for fuzzing: sound ones of every format to start from, changes to them, and what must hold of the result.

`test_picture_fuzzing.py` does it some hundred times, `scripts/checks/fuzz_readers.py --kind picture` millions of times.
"""

import io
import os
import random
import struct
import tempfile
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from hostile import assert_showable
from mutation import EDGES, changed_bytes
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from sd.pipeline.image.masks import mask_from, rule_for
from sd.pipeline.image.reading import FORMATS, PictureError, read_rgba
from sd.pipeline.image.stored_settings.texts import read_foreign_texts

MEGAPIXELS = 0.25  # of the largest picture that is read: bounds what one input may take
KINDS = {  # how files of a format begin
    b"\x89PNG": "PNG", b"\xff\xd8": "JPEG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP", b"II": "TIFF", b"MM": "TIFF",
}  # fmt: skip


@cache
def folder() -> Path:
    """For the one file that is read: in memory, where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="pictures-", dir=place))


def examine(data: bytes) -> str:
    """Read a picture, its texts, and the mask that it makes. Returns its format or "refused".

    Raises AssertionError for a fault of the reader, or whatever error it let through.
    """
    path = folder() / f"picture-{os.getpid()}"
    path.write_bytes(data)
    try:
        with suppress(PictureError):
            texts = read_foreign_texts(path)
            assert all(isinstance(text, str) for pair in texts.items() for text in pair)
        try:
            picture = read_rgba(path, megapixels=MEGAPIXELS)
        except PictureError as error:
            problem = str(error)
            assert_showable(problem)
            return "refused"
    finally:
        path.unlink()
    assert type(picture) is Image.Image
    assert picture.mode in ("RGB", "RGBA")
    assert 0 < picture.width * picture.height <= MEGAPIXELS * 10**6
    assert (picture.mode == "RGBA") == (picture.convert("RGBA").getextrema()[3] != (255, 255))
    mask = mask_from(picture, rule_for(picture))
    assert (mask.mode, mask.size) == ("L", picture.size)
    return kind_of(data)


def kind_of(data: bytes) -> str:
    return next((kind for start, kind in KINDS.items() if data.startswith(start)), "picture")


def seeds() -> list[bytes]:
    """Small pictures: each format, each mode that it holds, with texts, profiles, orientation and transparency."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8), "RGBA")
    deep = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300)
    exif, info = Image.Exif(), PngInfo()
    exif[274] = 6
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 5".encode("utf-16-be")
    info.add_text("parameters", "a cat\nSteps: 5", zip=True)
    info.add_itxt("sd", '{"prompt": "a cat"}', zip=True)
    modes = {mode: colours.convert("RGB").convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")}
    modes |= {"RGBA": colours, "LA": colours.convert("LA"), "I;16": deep}
    kinds = [(name, mode, {}) for name in FORMATS for mode in modes]
    kinds += [("TIFF", "RGB", {"compression": each}) for each in ("jpeg", "tiff_lzw", "tiff_adobe_deflate", "packbits")]
    kinds += [("PNG", "P", {"transparency": bytes(range(9))}), ("PNG", "RGB", {"transparency": (1, 2, 3)})]
    kinds += [("PNG", "RGB", {"icc_profile": bytes(200), "pnginfo": info, "exif": exif}), ("PNG", "P", {"bits": 2})]
    kinds += [(name, "RGB", {"exif": exif}) for name in ("JPEG", "WEBP", "TIFF", "AVIF")]
    kinds += [("JPEG", "RGB", {"progressive": True}), ("WEBP", "RGBA", {"lossless": True})]
    kinds += [(name, "RGB", {"save_all": True, "append_images": [modes["RGB"]]}) for name in ("GIF", "MPO", "TIFF")]
    found = []
    for name, mode, options in kinds:
        if name == "AVIF" and not features.check("avif"):
            continue
        file = io.BytesIO()
        with suppress(OSError, ValueError):  # a mode that the format does not have
            modes[mode].save(file, name, **options)
            found.append(file.getvalue())
    return list(dict.fromkeys(found))


def mutated(data: bytes, pick: random.Random) -> bytes:
    """The file with one to four changes."""
    for _ in range(pick.choice((1, 1, 1, 2, 2, 3, 4))):
        change = {"PNG": changed_png, "TIFF": changed_tiff}.get(kind_of(data), changed_header)
        data = changed_bytes(data, pick) if pick.random() < 0.3 else change(data, pick)
    return data


def changed_header(data: bytes, pick: random.Random) -> bytes:
    """A number written over, near the start, where sizes and places are."""
    result = bytearray(data or b"\0")
    width = pick.choice((1, 2, 4))
    place = pick.randrange(min(len(result), 200))
    number = pick.choice((*EDGES, pick.randrange(64))) % (1 << 8 * width)
    result[place : place + width] = number.to_bytes(width, pick.choice(("little", "big")))
    return bytes(result)


def changed_png(data: bytes, pick: random.Random) -> bytes:
    """A chunk changed, moved, doubled, removed or renamed, all with matching checksums."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return changed_bytes(data, pick)
    number = pick.randrange(len(chunks))
    name, body = chunks[number]
    what = pick.randrange(6)
    if what == 0:
        chunks[number] = (name, changed_bytes(body, pick))
    elif what == 1:
        chunks.insert(pick.randrange(len(chunks)), chunks.pop(number))
    elif what == 2:
        chunks.insert(pick.randrange(len(chunks)), (name, body))
    elif what == 3:
        del chunks[number]
    elif what == 4:
        names = {*(name for name, _ in chunks), b"acTL", b"fcTL", b"tRNS", b"iCCP", b"zTXt"}
        chunks[number] = (pick.choice(sorted(names)), body)
    elif name in (b"IDAT", b"zTXt", b"iCCP"):  # what is compressed, changed
        start = 0 if name == b"IDAT" else body.find(b"\0") + 2
        with suppress(zlib.error):
            inner = zlib.decompressobj().decompress(body[start:], 2**20)
            chunks[number] = (name, body[:start] + zlib.compress(changed_bytes(inner, pick)))
    result = data[:8]
    for name, body in chunks:
        result += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return result


def changed_tiff(data: bytes, pick: random.Random) -> bytes:
    """A tag's number, type, count or value changed, to one of another tag or to an extreme."""
    order = "<" if data[:2] == b"II" else ">"
    result = bytearray(data)
    with suppress(struct.error, ValueError, IndexError):
        directory = struct.unpack(f"{order}I", data[4:8])[0]
        count = struct.unpack(f"{order}H", data[directory : directory + 2])[0]
        entry = directory + 2 + 12 * pick.randrange(count)
        place, width = pick.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2)))
        number = pick.choice((*EDGES, pick.randrange(20), *range(254, 285), 338, 339, 530)) % (1 << 8 * width)
        result[entry + place : entry + place + width] = number.to_bytes(width, "little" if order == "<" else "big")
    return bytes(result)
