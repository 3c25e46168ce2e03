"""Read input pictures: upright, 8 bits a channel, sRGB, with the transparent part as a mask.

Files are untrusted. Only common formats are tried (some others start other programs), the size is checked before memory
is allocated, and every error is one sentence.
"""

import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, ImageChops, UnidentifiedImageError

from sd.pipeline.errors import PictureError
from sd.pipeline.image.colours import in_srgb, split
from sd.pipeline.image.input_settings import MEGAPIXELS
from sd.pipeline.image.png_chunks import png_size, slim

Read = TypeVar("Read")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
LARGEST_PIXELS = MEGAPIXELS * 10**6
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # ISO/IEC 23008-12, annex B
ORIENTATION, SUBFILE_TYPE = 274, 254  # tags
MOST_PREVIEWS = 16  # in a TIFF: each half as large as the one before
TURNS = {  # Exif's orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises for damaged files; it also makes assertions about them.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, RuntimeError)
DAMAGE += (struct.error, zlib.error, AssertionError)


def read_picture(
    path: Path, *, background: str = "white", megapixels: float = MEGAPIXELS
) -> tuple[Image.Image, Image.Image | None]:
    """An input picture, and its transparent part.

    background  the colour behind transparent pixels
    megapixels  of the largest picture that is read
    returns     an RGB picture, and None or, if some pixel is not opaque, a mask (L) of the same size: 255 is
                transparent, 0 is opaque

    Raises PictureError for files that are not exactly one picture.
    """
    picture = read_rgba(path, megapixels=megapixels)
    if picture.mode == "RGB":
        return picture, None
    return flatten(picture, background), ImageChops.invert(picture.getchannel("A"))


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """RGB, or RGBA on a background colour -> RGB"""
    if picture.mode == "RGB":
        return picture
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, background), picture.getchannel("A"))


def read_rgba(path: Path, *, colour_managed: bool = True, megapixels: float = MEGAPIXELS) -> Image.Image:
    """A picture from a file: RGBA if some pixel is not opaque, otherwise RGB.

    colour_managed  whether colours are converted to sRGB
    megapixels      of the largest picture that is read

    Raises PictureError for files that are not exactly one picture.
    """
    return read_as(path, partial(as_rgba, colour_managed=colour_managed), megapixels=megapixels)


def read_as(path: Path, convert: Callable[[Path, Image.Image], Read], *, megapixels: float = MEGAPIXELS) -> Read:
    """What `convert` makes of the picture in a file, as Pillow opens it.

    megapixels  of the largest picture that is read

    Raises PictureError for files that are not exactly one picture.
    """
    path = Path(path)
    with opened(path) as file, decoding(path):
        if size := png_size(file):
            check_size(path, size, megapixels)
            picture = slim(file).opened()
        else:
            picture = Image.open(file, formats=readable(FORMATS))
        check_size(path, picture.size, megapixels)  # also of a PNG: it may say its size a second time
        _check_frames(path, picture)
        picture.load()
        return convert(path, picture)


def as_rgba(name: Path | str, picture: Image.Image, *, colour_managed: bool = True) -> Image.Image:
    """A picture opened with Pillow, upright, 8 bits a channel: RGBA if some pixel is not opaque, otherwise RGB."""
    colours, opacity = split(name, picture)
    profile = picture.info.get("icc_profile") if colour_managed else None
    rgb = upright(in_srgb(colours, profile) if profile else colours.convert("RGB"), picture)
    if opacity is None or opacity.getextrema() == (255, 255):
        rgb.info = {}
        return rgb
    return Image.merge("RGBA", (*rgb.split(), upright(opacity, picture)))


def upright(pixels: Image.Image, picture: Image.Image) -> Image.Image:
    """Pixels of a picture, turned as its Exif data say. Damaged ones are ignored, as viewers do."""
    with suppress(*DAMAGE):
        turn = TURNS.get(picture.getexif().get(ORIENTATION))
        return pixels if turn is None else pixels.transpose(turn)
    return pixels


def readable(formats: Iterable[str]) -> list[str]:
    """Those of the formats that this Pillow reads."""
    Image.init()  # only then does Image.OPEN have all of them
    return [name for name in formats if name in Image.OPEN]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file that may be a picture. Raises PictureError if it cannot be opened."""
    if "\0" in str(path):
        raise PictureError(f"{str(path)!r} is not a file name: it holds a NUL character.")
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise PictureError(f"{path} is a folder. Give one picture file.")
        if not stat.S_ISREG(kind):
            raise PictureError(f"{path} is a device or a pipe. Save the picture to a file and give that.")
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        is_address = str(path).startswith(("http:/", "https:/"))
        hint = "Download the picture, and give the file" if is_address else "Give a picture file"
        raise PictureError(f"{path} does not exist. {hint}.") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be opened: {error.strerror}.") from None
    with file:
        start = file.read(4096)
        if not start:
            raise PictureError(f"{path} is empty (0 bytes). Give a picture file.")
        if is_heic(start):
            raise PictureError(f"{path} is a HEIC picture, which is not read here. Save it as PNG or JPEG.")
        file.seek(0)
        yield file


def is_heic(start: bytes) -> bool:
    """Whether a file that starts so holds pictures compressed as HEVC only: any of its brands says so, none AVIF."""
    if start[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(start[:4], "big"), len(start) - 3)
    brands = {start[8:12], *(start[place : place + 4] for place in range(16, end, 4))}
    return bool(brands & HEIC_BRANDS) and not brands & {b"avif", b"avis"}


@contextmanager
def decoding(path: Path | str) -> Iterator[None]:
    """What Pillow raises while it reads a file becomes a PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes and odd metadata
            yield
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(
            f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels. Scale it down, or raise the "
            "limit with --max-megapixels; in Python, also set PIL.Image.MAX_IMAGE_PIXELS."
        ) from None
    except UnidentifiedImageError:
        raise PictureError(
            f"{path} is not a picture that is read here ({', '.join(FORMATS)}), or its first bytes are damaged. "
            "Save it as PNG."
        ) from None
    except DAMAGE as error:
        reason = str(error).split("\n")[0][:100].rstrip(".") or type(error).__name__
        raise PictureError(f"{path} is cut off or damaged: {reason}. Get it again, or save it again.") from None


def check_size(name: Path | str, size: tuple[int, int], megapixels: float) -> None:
    """Raise PictureError for a picture (width, height) of more pixels."""
    if size[0] * size[1] > megapixels * 10**6:
        raise PictureError(
            f"{name} has {size[0]}x{size[1]} pixels; at most {megapixels:g} million are read. Scale it down, or raise "
            "the limit with --max-megapixels."
        )


def _check_frames(path: Path, picture: Image.Image) -> None:
    # A JPEG of format MPO is a photograph followed by previews or depth; the photograph comes first.
    if picture.format == "MPO" or not getattr(picture, "is_animated", False):
        return
    if picture.format != "TIFF" or not _has_previews(picture):
        raise PictureError(
            f"{path} holds more than one frame or page. Give a single one, saved as PNG: "
            "ffmpeg -i FILE -frames:v 1 frame.png takes the first."
        )


def _has_previews(picture: Image.Image) -> bool:
    """Whether the pages of a TIFF after the first are smaller versions of it."""
    pages = range(1, picture.n_frames)
    if len(pages) > MOST_PREVIEWS:
        return False
    found = []
    for page in pages:
        picture.seek(page)
        found.append(picture.tag_v2.get(SUBFILE_TYPE, 0) & 1)
    picture.seek(0)
    return all(found)
