"""The texts in a picture file that say how it was made. Files are untrusted."""

import json
from pathlib import Path

from PIL import Image

from sd.pipeline.image.png_chunks import png_size, slim
from sd.pipeline.image.reading import LARGEST_PIXELS, PictureError, decoding, opened, readable
from sd.pipeline.settings import FIELDS, SettingError, Settings

EXIF, USER_COMMENT = 0x8769, 0x9286  # tags


def read_texts(path: Path) -> dict[str, str]:
    """The text chunks before the pixels of a PNG; none if it is damaged, or not a PNG file. The pixels are not read."""
    try:
        with opened(path) as file, decoding(path), Image.open(file, formats=["PNG"]) as picture:
            return {key: str(text) for key, text in picture.info.items() if isinstance(text, str)}
    except PictureError:
        return {}


def read_foreign_texts(path: Path) -> dict[str, str]:
    """All texts of a PNG, also those after the pixels; of other pictures, the user comment as "parameters".

    Raises PictureError if it is not a picture, or if its only text is too long to be read.
    """
    with opened(path) as file, decoding(path):
        if png_size(file):
            png = slim(file, with_texts=True)
            picture, too_long = png.opened(), png.too_long
        else:
            picture, too_long = Image.open(file, formats=readable(("PNG", "JPEG", "WEBP", "AVIF"))), ()
        if picture.format != "PNG":
            comment = picture.getexif().get_ifd(EXIF).get(USER_COMMENT)
            return {} if comment is None else {"parameters": user_comment(comment)}
        texts = {key: str(text) for key, text in picture.info.items() if isinstance(text, str)}
        if not {"sd", "parameters"} & set(texts) and picture.width * picture.height <= LARGEST_PIXELS:
            texts |= {key: str(text) for key, text in picture.text.items()}  # reads all of the file
        if too_long and not {"sd", "parameters"} & set(texts):
            names = ", ".join(map(repr, too_long))
            raise PictureError(f"{path}: its text {names} is longer than a megabyte when unpacked, and is not read.")
        return texts


def user_comment(value: bytes | str) -> str:
    """The text of an Exif user comment: eight bytes that say how it is written, then the text. Exif 2.32, 4.6.5."""
    if isinstance(value, str):
        return value.removeprefix("ASCII\0\0\0").removeprefix("UNICODE\0")
    code, text = value[:8], value[8:]
    if code != b"UNICODE\0":
        return (text if code in (b"ASCII\0\0\0", bytes(8)) else value).decode("utf-8", "replace").strip("\0")
    big = text[0::2].count(0) >= text[1::2].count(0)  # the byte order is not specified; in most text, one half is zeros
    return text.decode("utf-16-be" if big else "utf-16-le", "replace").strip("\0")


def read_exact(path: Path) -> dict:
    """The exact settings, and what is stored with them, in a picture of ours; empty for others."""
    return exact_in(read_texts(path))


def exact_in(texts: dict[str, str]) -> dict:
    """The same from the texts of a picture."""
    try:
        exact = json.loads(texts.get("sd", "{}"))
    except (ValueError, RecursionError):
        return {}
    return exact if isinstance(exact, dict) else {}


def settings_from(exact: dict) -> Settings | None:
    """The settings in the result of `read_exact`; None if they are invalid."""
    try:
        return Settings(**{name: value for name, value in exact.items() if name in FIELDS})
    except (SettingError, TypeError):
        return None
