"""From any kind of pixels to 8 bits a channel in sRGB, and the opacity."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from sd.pipeline.errors import PictureError

BITS, COMPRESSION, COLOURS, NUMBERS, SUBSAMPLING = 258, 259, 262, 339, 530  # tags of TIFF 6.0
WHITE_IS_0, YCBCR = 0, 6  # of COLOURS
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "CMYK")


def split(name: Path | str, picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours (L, RGB or CMYK), and the opacity (L) or None; 8 bits a channel. Raises PictureError."""
    mode = picture.mode
    white, is_negative = _tiff_white(name, picture)
    if _is_deep(picture):
        return _split_16_bits(picture, white, is_negative=is_negative)
    if mode in ("I", "F"):
        raise PictureError(
            f"{name} has 32 bits a pixel, and nothing says which number is white. Save it with 8 or 16 bits."
        )
    if mode not in MODES:
        raise PictureError(f"{name} has colours of kind {mode}. Save it as RGB.")
    if mode in ("P", "PA") and picture.palette is None:
        raise PictureError(f"{name} is cut off or damaged: it has no palette. Get it again, or save it again.")
    grey = mode in ("1", "L", "LA", "La")
    if mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data or mode == "RGBa":
        rgba = picture.convert("RGBA")
        return rgba.getchannel("R") if grey else rgba.convert("RGB"), rgba.getchannel("A")
    if mode in ("L", "RGB", "CMYK"):
        return picture, None
    return picture.convert("L" if grey else "RGB"), None


def deep_grey(name: Path | str, picture: Image.Image) -> np.ndarray | None:
    """The levels (H, W) of a picture in greys of up to 16 bits, 0 is black; None for any other. Raises PictureError."""
    if not _is_deep(picture):
        return None
    white, is_negative = _tiff_white(name, picture)
    levels = _deep_levels(picture)
    return white - levels if is_negative else levels


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def _deep_levels(picture: Image.Image) -> np.ndarray:
    """(H, W) uint16"""
    levels = np.asarray(picture)
    return levels if levels.dtype.itemsize == 2 else levels.clip(0, 65535).astype(np.uint16)


def _tiff_white(name: Path | str, picture: Image.Image) -> tuple[int, bool]:
    """The largest level of deep greys, and whether it is black. Raises PictureError for pixels that Pillow misreads."""
    mode = picture.mode
    tags: Mapping = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    bits = tags.get(BITS) or (16,)
    if 2 in (tags.get(NUMBERS) or ()) and bits[0] == 8:
        raise PictureError(f"{name} has levels from -128 to 127. Save it with levels from 0 to 255.")
    # older Pillows take these for RGB
    is_plain = mode == "YCbCr" and tags.get(SUBSAMPLING, (1, 1)) == (1, 1)
    if tags.get(COLOURS) == YCBCR and tags.get(COMPRESSION) == 1 and mode != "L" and not is_plain:
        raise PictureError(f"{name} has colours as YCbCr, not compressed, which are not read here. Save it as RGB.")
    return (4095 if bits[0] == 12 else 65535), tags.get(COLOURS) == WHITE_IS_0


def _split_16_bits(picture: Image.Image, white: int, *, is_negative: bool) -> tuple[Image.Image, Image.Image | None]:
    """Greys of up to 16 bits, in 8. Pillow would cut off at 255 instead of scaling."""
    levels = _deep_levels(picture)
    scaled = ((2 * 255 * np.arange(65536) + white) // (2 * white)).clip(0, 255).astype(np.uint8)
    if not is_negative and levels.max() < 256:  # labels, or 8 bits in 16: all but 0 stay apart from black
        scaled[1:] = scaled[1:].clip(1)
    grey = Image.fromarray((255 - scaled if is_negative else scaled)[levels])
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
