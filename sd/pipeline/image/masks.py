"""Masks: which pixels are repainted. White (255) is repainted, black (0) is kept bit for bit, grey is mixed.

mask = prepare(match(read_mask(path), picture.size), blur=4)
placement = masked_region(mask, (512, 512), padding=32)      # or fit(...), natural(...) for the whole picture
made = ... placement.place(picture), latent_mask(placement.place(mask)) ...
result = paste_back(picture, made, mask, placement)
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from sd.pipeline.image.reading import PictureError, flatten, read_rgba
from sd.pipeline.image.resizing import Placement, Size, fit, resized


def read_mask(path: Path) -> Image.Image:
    """A mask (L) from a picture file: its grey levels, ignoring colour profiles.

    If a file is transparent and everything visible has one colour, such as strokes on an empty layer, the strokes are
    white in the mask. Otherwise transparent pixels count as black. Raises PictureError for files that are not pictures.
    """
    picture = read_rgba(path, colour_managed=False)
    if picture.mode == "RGB":
        return picture.convert("L")
    if _has_one_colour(picture):
        return picture.getchannel("A")
    return flatten(picture, "black").convert("L")


def _has_one_colour(picture: Image.Image) -> bool:
    """Whether no pixel (RGBA) looks more than one level different from the most opaque one, on any background."""
    pixels = np.asarray(picture).reshape(-1, 4).astype(np.int16)
    opacity = pixels[:, 3].astype(np.int32)
    solid = pixels[opacity.argmax()]
    return all((np.abs(pixels[:, i] - solid[i]) * opacity).max() <= 255 for i in range(3))


def match(mask: Image.Image, size: Size) -> Image.Image:
    """The mask at the size of its picture. Raises PictureError if it has another shape."""
    (width, height), (wanted_width, wanted_height) = mask.size, size
    # sides that were rounded to whole pixels differ by half a pixel
    if abs(width * wanted_height - height * wanted_width) > (wanted_width + wanted_height) / 2:
        raise PictureError(
            f"the mask is {width}x{height} and the picture {wanted_width}x{wanted_height}. "
            "Give a mask of the same size, or at least of the same shape."
        )
    return resized(mask, size)


def prepare(mask: Image.Image, *, invert: bool = False, threshold: int = 0, blur: float = 0) -> Image.Image:
    """Invert a mask (L), make it black and white, then blur it, as far as asked for.

    threshold  0 keeps grey levels; 1 to 255: this level and brighter ones become white, all others black
    blur       radius in pixels, the standard deviation of a Gaussian; no pixel farther than three of it changes

    Raises PictureError if nothing is left to repaint.
    """
    if invert:
        mask = ImageChops.invert(mask)
    if threshold:
        mask = mask.point([255 if level >= threshold else 0 for level in range(256)])
    if mask.getbbox() is None:
        turned = "after inverting it, " if invert else ""
        below = f" at threshold {threshold}" if threshold else ""
        raise PictureError(
            f"{turned}the mask is black everywhere{below}, so nothing would be repainted. Paint white what is to "
            f"change{'' if invert else ', or invert the mask with --invert-mask'}."
        )
    if not blur:
        return mask
    blurred = mask.filter(ImageFilter.GaussianBlur(blur))
    if blurred.getbbox() is None:
        raise PictureError(f"what is white in the mask is so small that --mask-blur {blur:g} wipes it out. Use less.")
    return blurred


def latent_mask(mask: Image.Image, factor: int = 8) -> np.ndarray:
    """The mask of the latents: a latent is repainted as much as the most repainted of its pixels.

    mask     (L) of the working size, sides multiples of the factor
    factor   pixels per latent along one side
    returns  (H / factor, W / factor) float32 in [0, 1]; `> 0` gives every latent that any repainted pixel depends on

    Raises ValueError for other sizes.
    """
    width, height = mask.size
    if width % factor or height % factor:
        raise ValueError(
            f"mask sides must be multiples of {factor} (one latent per {factor}x{factor}), got {width}x{height}"
        )
    cells = np.asarray(mask).reshape(height // factor, factor, width // factor, factor)
    return cells.max(axis=(1, 3)).astype(np.float32) / 255


def masked_region(mask: Image.Image, working: Size, padding: int) -> Placement:
    """Place the region around the mask at the working size, as large as possible.

    mask     (L) as large as the picture, not black everywhere
    padding  pixels of the picture around the bounds of the mask

    The region grows to the shape of the working size, and moves to stay inside the picture. If the picture is too
    narrow for that shape, the rest of the working size is padding.
    """
    bounds = mask.getbbox()
    assert bounds is not None, "prepare refuses a mask that is black everywhere"
    left, top = (max(0, low - padding) for low in bounds[:2])
    right, bottom = (min(side, high + padding) for side, high in zip(mask.size, bounds[2:], strict=True))
    width, height = right - left, bottom - top
    width, height = (
        max(width, _ceil(height * working[0], working[1])),
        max(height, _ceil(width * working[1], working[0])),
    )
    left, right = _grown(left, right, width, mask.width)
    top, bottom = _grown(top, bottom, height, mask.height)
    size = right - left, bottom - top
    has_shape = abs(size[0] * working[1] - size[1] * working[0]) <= max(working)  # to a pixel
    inside = fit(size, working, "stretch" if has_shape else "pad")
    return replace(inside, picture=mask.size, taken=(left, top, right, bottom))


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _grown(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """The interval from low to high, grown equally at both ends, but kept between 0 and the limit."""
    length = min(length, limit)
    start = min(max(0, low - (length - (high - low)) // 2), limit - length)
    return start, start + length


def composite(picture: Image.Image, made: Image.Image, mask: Image.Image) -> Image.Image:
    """The new picture where the mask is white, the old one, bit for bit, where it is black.

    picture, made  RGB, 8 bits, of one size
    mask           L, of that size; a level m gives (m * made + (255 - m) * picture) / 255, rounded
    """
    return Image.composite(made, picture, mask)


def paste_back(picture: Image.Image, made: Image.Image, mask: Image.Image, placement: Placement) -> Image.Image:
    """Paste a result of the working size into the whole picture; where the mask is 0, not a bit changes.

    picture, mask  RGB and L, as large as the placement's picture
    made           RGB, of the working size
    """
    whole = picture.copy()
    whole.paste(placement.back(made), placement.taken[:2])
    return composite(picture, whole, mask)
