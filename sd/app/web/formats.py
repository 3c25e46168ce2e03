"""Pictures of ours in other formats, which carry the same text of settings."""

import base64
import io

from sd.app.web.job import Picture
from sd.app.web.worker import Worker

EXIF, USER_COMMENT = 0x8769, 0x9286  # tags: of the second table, and in it
MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def in_format(png: bytes, kind: str, quality: int = 100, infotext: str = "") -> bytes:
    """A PNG file's bytes as those of a file of another kind: "png" (as it is), "jpeg" or "webp".

    quality   0 to 100
    infotext  of its settings, which a PNG carries already
    """
    if kind == "png":
        return png
    from PIL import Image

    exif, file = Image.Exif(), io.BytesIO()
    if infotext:
        exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + infotext.encode("utf-16-be")  # Exif 2.32, 4.6.5
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        picture.convert("RGB").save(file, kind.upper(), quality=quality, exif=exif)
    return file.getvalue()


def preview_in_format(url: str, kind: str, size: tuple[int, int] | None) -> tuple[bytes, tuple[int, int]]:
    """A preview, which is a data URL, as the bytes of a file of this kind, and its size: its own, or the one given."""
    from PIL import Image

    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as preview:
        size = size or preview.size
        preview.resize(size, Image.Resampling.BICUBIC).save(file, kind.upper())
    return file.getvalue(), size


def png_of(worker: Worker, picture: Picture) -> bytes:
    """The bytes of a finished picture: from memory, else from its file."""
    return worker.memory.get(picture.sha256) or picture.path.read_bytes()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
