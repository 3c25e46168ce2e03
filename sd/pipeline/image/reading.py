"""Read input pictures: upright, 8 bits a channel, sRGB, with the transparent part as a mask.

Files are untrusted. Only common formats are tried (some others start other programs), the size is checked before memory
is allocated, and every error is one sentence.
"""

import io
import stat
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
LARGEST_PIXELS = 2**27  # 134 million: enough for any phone's camera, but not for a file made to fill the memory
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12, annex B
# What Pillow raises for damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, RuntimeError)
DAMAGE += (struct.error, zlib.error)


class PictureError(ValueError):
    """A picture or mask that cannot be used: what was given, what is allowed, what to do."""


def read_picture(path: Path, *, background: str = "white") -> tuple[Image.Image, Image.Image | None]:
    """An input picture, and its transparent part.

    background  the colour behind transparent pixels
    returns     an RGB picture, and None or, if some pixel is not opaque, a mask (L) of the same size: 255 is
                transparent, 0 is opaque

    Raises PictureError for files that are not exactly one picture.
    """
    picture = read_rgba(path)
    if picture.mode == "RGB":
        return picture, None
    opacity = picture.getchannel("A")
    return flatten(picture, background), ImageChops.invert(opacity)


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """RGBA -> RGB, on a background colour."""
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, background), picture.getchannel("A"))


def read_rgba(path: Path, *, colour_managed: bool = True) -> Image.Image:
    """A picture from a file: RGBA if some pixel is not opaque, otherwise RGB.

    colour_managed  whether colours are converted to sRGB

    Raises PictureError for files that are not exactly one picture.
    """
    path = Path(path)
    with opened(path) as file, decoding(path):
        picture = Image.open(file, formats=readable(FORMATS))
        _check_frames_and_size(path, picture)
        return _as_rgba(path, picture, colour_managed=colour_managed)


def opened_picture(picture: Image.Image, *, background: str = "white") -> Image.Image:
    """A copy of a picture opened with Pillow, in RGB as from `read_picture`. Raises PictureError if unusable."""
    picture = _as_rgba("the picture", picture, colour_managed=True)
    return picture if picture.mode == "RGB" else flatten(picture, background)


def _as_rgba(name: Path | str, picture: Image.Image, *, colour_managed: bool) -> Image.Image:
    """Upright, 8 bits a channel: RGBA if some pixel is not opaque, otherwise RGB."""
    picture.load()
    with suppress(*DAMAGE):  # damaged metadata is ignored, as viewers do
        upright = ImageOps.exif_transpose(picture)
        upright.format = picture.format  # copies lose it
        picture = upright
    colours, opacity = _split(name, picture)
    profile = picture.info.get("icc_profile") if colour_managed else None
    rgb = in_srgb(colours, profile) if profile else colours.convert("RGB")
    if opacity is None or opacity.getextrema() == (255, 255):
        rgb = rgb.copy()
        rgb.info = {}
        return rgb
    return Image.merge("RGBA", (*rgb.split(), opacity))


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
        raise PictureError(f"{path} does not exist. Give a picture file.") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be opened: {error.strerror}.") from None
    with file:
        start = file.read(16)
        if not start:
            raise PictureError(f"{path} is empty (0 bytes). Give a picture file.")
        if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
            raise PictureError(f"{path} is a HEIC picture, which is not read here. Save it as PNG or JPEG.")
        file.seek(0)
        yield file


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """What Pillow raises while it reads a file becomes a PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes and odd metadata
            yield
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "far more") from None
    except UnidentifiedImageError:
        raise PictureError(
            f"{path} is not a picture that is read here ({', '.join(FORMATS)}), or its first bytes are damaged. "
            "Save it as PNG."
        ) from None
    except DAMAGE as error:
        reason = str(error).split("\n")[0][:100].rstrip(".") or type(error).__name__
        raise PictureError(f"{path} is cut off or damaged: {reason}. Get it again, or save it again.") from None


def _too_large(path: Path, given: str) -> PictureError:
    return PictureError(
        f"{path} has {given} pixels; at most {LARGEST_PIXELS // 10**6} million are read. Scale it down."
    )


def _check_frames_and_size(path: Path, picture: Image.Image) -> None:
    if picture.width * picture.height > LARGEST_PIXELS:
        raise _too_large(path, f"{picture.width}x{picture.height}")
    # A JPEG of format MPO is a photograph followed by previews or depth; the photograph comes first.
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise PictureError(
            f"{path} holds more than one frame or page. Give a single one, saved as PNG: "
            "ffmpeg -i FILE -frames:v 1 frame.png takes the first."
        )


def _split(path: Path | str, picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours (L, RGB or CMYK), and the opacity (L) or None; 8 bits a channel."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        return _split_16_bits(picture)
    if mode in ("I", "F"):
        raise PictureError(
            f"{path} has 32 bits a pixel, and nothing says which number is white. Save it with 8 or 16 bits."
        )
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr", "CMYK"):
        raise PictureError(f"{path} has colours of kind {mode}. Save it as RGB.")
    grey = mode in ("1", "L", "LA")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return rgba.getchannel("R") if grey else rgba.convert("RGB"), rgba.getchannel("A")
    if mode in ("RGB", "CMYK"):
        return picture, None
    return picture.convert("L" if grey else "RGB"), None


def _split_16_bits(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Greys of 16 bits: 65535 is white. Pillow would cut off at 255 instead of scaling."""
    levels = np.asarray(picture).astype(np.int64)
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 257 * 255 = 65535
    clear = picture.info.get("transparency")  # the one level that is transparent
    if clear is None:
        return grey, None
    return grey, Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8))


def in_srgb(colours: Image.Image, profile: bytes) -> Image.Image:
    """L, RGB or CMYK, and its ICC profile -> RGB in sRGB. A damaged or unfitting profile is ignored, as viewers do."""
    plain = colours.convert("RGB")
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        channels = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(given.profile.xcolor_space.strip())
        source = plain if (channels, colours.mode) == ("RGB", "L") else colours
        is_srgb = "srgb" in ImageCms.getProfileDescription(given).lower()  # converting would only add rounding
        if channels != source.mode or is_srgb:
            return plain
        return ImageCms.profileToProfile(
            source,
            given,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImportError, OSError, ImageCms.PyCMSError):  # the first: a Pillow without LittleCMS
        return plain
