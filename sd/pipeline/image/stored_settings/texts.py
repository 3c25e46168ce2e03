"""All texts in a picture file, wherever programs put them: chunks, Exif, XMP, comments, and the lowest bits of pixels.

Files are untrusted: sizes are limited, and what is damaged is passed over.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import iTXt

from sd.pipeline.image.png_chunks import png_size, slim
from sd.pipeline.image.reading import DAMAGE, FORMATS, LARGEST_PIXELS, PictureError, decoding, opened, readable
from sd.pipeline.image.stored_settings.settings_line import LONGEST_TEXT

EXIF = 0x8769  # the tag of the second table
TAGS = {  # of Exif and TIFF
    0x9286: "UserComment",
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0131: "Software",
    0x9C9B: "XPTitle",
    0x9C9C: "XPComment",
    0x9C9F: "XPSubject",
}
CODES = {
    b"ASCII\0\0\0": (),
    b"UNICODE\0": (),
    b"JIS\0\0\0\0\0": ("iso2022_jp", "utf-8", "shift_jis", "euc_jp"),
    bytes(8): (),
}
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
TELLING = re.compile(r"\bSteps: ?\d|^\s*\{\s*\"|\bNegative prompt:")  # a text of settings, or of JSON
STEALTH = {"pnginfo": "RGBA", "pngcomp": "RGBA", "rgbinfo": "RGB", "rgbcomp": "RGB"}  # ending of the mark -> colours


def read_foreign_texts(path: Path) -> dict[str, str]:
    """All texts of a picture file, by the names of their chunks, tags or places.

    PNG chunks keep their names; "pixels" is the picture's own size, such as 512x768. Raises
    PictureError if it is not a picture.
    """
    texts: dict[str, str] = {}
    with opened(path) as file, decoding(path):
        png = slim(file, with_texts=True) if png_size(file) else None
        picture = png.opened() if png else Image.open(file, formats=readable(FORMATS))
        small = picture.width * picture.height <= LARGEST_PIXELS
        texts |= dict(_chunks(picture.info))
        if picture.format == "PNG" and small and not {"sd", "parameters"} & set(texts):
            texts |= dict(_chunks(picture.text))  # also those behind the pixels; reads all of the file
        if picture.format != "PNG" or small or "exif" in picture.info:  # else Pillow decodes the pixels to look for it
            with suppress(*DAMAGE):
                texts |= {name: text for name, text in _tags(picture.getexif()) if name not in texts}
        texts |= {name: text for name, text in _xmp(picture.info) if name not in texts}
        if small and picture.format in ("PNG", "WEBP") and not any(TELLING.search(text) for text in texts.values()):
            with suppress(*DAMAGE):
                texts |= _stealth(picture)
        if png and png.too_long and not any(TELLING.search(text) for text in texts.values()):
            names = ", ".join(map(repr, png.too_long))
            raise PictureError(f"{path}: its text {names} is longer than a megabyte when unpacked, and is not read.")
        texts["pixels"] = f"{picture.width}x{picture.height}"
    return texts


def _chunks(info: dict) -> Iterator[tuple[str, str]]:
    """The texts of PNG chunks, and comments. Pillow reads chunks without an encoding as Latin-1, which few write."""
    for name, value in info.items():
        if name in ("comment", "Comment") and isinstance(value, bytes):
            yield name, text_of(value)
        elif isinstance(value, str) and isinstance(name, str):
            yield str(name), str(value) if isinstance(value, iTXt) else _not_latin(value)


def _not_latin(text: str) -> str:
    """UTF-8 that was read as Latin-1, as what it is; other texts as they are."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return str(text)


def _tags(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    """The texts in Exif. ComfyUI writes JSON into tags that belong to the camera, with a name before it."""
    for tag, value in [*exif.items(), *exif.get_ifd(EXIF).items()]:
        if tag not in TAGS:
            continue
        if isinstance(value, tuple):  # numbers, as Windows writes its own
            value = bytes(number for number in value if isinstance(number, int) and 0 <= number < 256)
        if isinstance(value, str):
            value = value.encode("latin-1", "replace") if tag != 0x9286 else value.encode("utf-8", "replace")
        if not isinstance(value, bytes):
            continue
        text = text_of(value)
        named = re.match(r"(prompt|workflow):(?=\s*\{)", text, re.IGNORECASE)
        yield (named[1].lower(), text[named.end() :]) if named else (TAGS[tag], text)


def _xmp(info: dict) -> Iterator[tuple[str, str]]:
    """The texts in XMP that say something of settings."""
    data = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    data = data.encode("utf-8", "replace") if isinstance(data, str) else data
    if not isinstance(data, bytes) or b"<!" in data or len(data) > 4 * LONGEST_TEXT:  # no entities
        return
    with suppress(ElementTree.ParseError, ValueError, LookupError):
        for element in ElementTree.fromstring(data.strip(b"\0 \r\n")).iter():
            for text in (element.text, *element.attrib.values()):
                if text and TELLING.search(text):
                    yield "xmp", text


def _stealth(picture: Image.Image) -> dict[str, str]:
    """The text in the lowest bits of the opacity or of the colours, column by column: a mark, its length, UTF-8."""
    for ending, mode in STEALTH.items():
        if mode not in (picture.mode, picture.mode[:3]):
            continue
        channels = slice(3, 4) if mode == "RGBA" else slice(0, 3)
        levels = np.asarray(picture)[:, :, channels].swapaxes(0, 1).reshape(-1)
        mark = f"stealth_{ending}".encode()
        head = np.packbits(levels[: 8 * (len(mark) + 4)] & 1).tobytes()
        if not head.startswith(mark):
            continue
        start, length = 8 * (len(mark) + 4), int.from_bytes(head[len(mark) :], "big")
        data = np.packbits(levels[start : start + min(length, 8 * 4 * LONGEST_TEXT)] & 1).tobytes()
        if ending.endswith("comp"):
            data = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, 4 * LONGEST_TEXT)  # gzip
        return {"stealth": data.decode("utf-8", "replace")}
    return {}


def text_of(value: bytes) -> str:
    """The text of a comment: after eight bytes that say how it is written (Exif 2.32, 4.6.5), or without them.

    What they say is often untrue. A byte order mark counts; else the first reading that looks like settings; else the
    first that is possible.
    """
    code, text = (value[:8].upper(), value[8:]) if value[:8].upper() in CODES else (b"", value)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if text.startswith(mark):
            return text[: len(text) // 2 * 2 if encoding == "utf-16" else None].decode(encoding, "replace").strip("\0")
    wide = ("utf-16-be", "utf-16-le")
    if text[0::2].count(0) < text[1::2].count(0):
        wide = wide[::-1]  # in most text, the high bytes are zeros
    narrow = (*CODES.get(code, ()), "utf-8", "cp1252")
    is_wide = text.count(0) > (0 if code == b"UNICODE\0" else len(text) // 4)
    likely = (*narrow, *wide) if code != b"UNICODE\0" else (*narrow[:-1], *wide, narrow[-1])
    order = (*wide, *narrow) if is_wide else likely
    readings = list(_readings(text, order))
    return next(filter(TELLING.search, readings), readings[0] if readings else text.decode("latin-1"))


def _readings(text: bytes, encodings: Iterable[str]) -> Iterator[str]:
    for encoding in encodings:
        whole = text[: len(text) // 2 * 2] if encoding.startswith("utf-16") else text
        with suppress(UnicodeDecodeError):
            yield whole.decode(encoding).strip("\0")
