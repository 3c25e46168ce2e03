"""Bring a picture to the networks' working size, and the result back to its place in the picture.

    placement = fit(picture.size, (512, 512), "crop")
    made = ... placement.place(picture) ...
    placement.back(made)                                # at the size of the part of the picture that was used

A mask goes the same way as its picture: `placement.place(mask)`.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sd.config import LARGEST_SIDE, SMALLEST_SIDE
from sd.pipeline.image.reading import PictureError

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are just outside


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part of a picture is used, and where it lies at the working size.

    picture  size of the whole picture
    taken    the part of it that is used, in its pixels
    working  size for the networks, multiples of 8
    shown    where that part lies at the working size; the rest is padding
    """

    picture: Size
    taken: Box
    working: Size
    shown: Box

    def place(self, picture: Image.Image) -> Image.Image:
        """A picture (RGB), mask (L) or depth map (F) at the working size. Padding repeats the nearest row or column."""
        if picture.size != self.picture:
            raise ValueError(f"the placement is for a picture of {self.picture}, got one of {picture.size}")
        part = resized(picture.crop(self.taken), size_of(self.shown))
        left, top, right, bottom = self.shown
        if part.size == self.working:
            return part
        margins = [(top, self.working[1] - bottom), (left, self.working[0] - right)]
        pixels = np.asarray(part)
        return Image.fromarray(np.pad(pixels, margins + [(0, 0)] * (pixels.ndim - 2), mode="edge"))

    def cut(self, made: Image.Image) -> Image.Image:
        """A picture of the working size without its padding."""
        if made.size != self.working:
            raise ValueError(f"the placement is for pictures made at {self.working}, got one of {made.size}")
        return made.crop(self.shown)

    def back(self, made: Image.Image) -> Image.Image:
        """A picture of the working size -> one of the size of `taken`, without padding."""
        return resized(self.cut(made), size_of(self.taken))

    def covers(self, mask: Image.Image) -> bool:
        """Whether all nonzero pixels of a mask (L, as large as the picture) lie in the part that is used."""
        bounds = mask.getbbox()
        if bounds is None:
            return True
        left, top, right, bottom = self.taken
        return left <= bounds[0] and top <= bounds[1] and bounds[2] <= right and bounds[3] <= bottom


def size_of(box: Box) -> Size:
    return box[2] - box[0], box[3] - box[1]


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """A picture (RGB), mask (L) or depth map (F) at another size; unchanged if it already has it."""
    if picture.size == size:
        return picture
    # Lanczos rings: around the white part of a mask it would leave grey specks on black
    return picture.resize(size, Image.Resampling.LANCZOS if picture.mode == "RGB" else Image.Resampling.BILINEAR)


def fit(picture: Size, working: Size, mode: str) -> Placement:
    """Place a picture at the working size.

    crop     scale until it covers the working size, and use the middle
    pad      scale until it fits inside, in the middle; the rest repeats its edges, as the model would treat bars of one
             colour as a part of the picture
    stretch  change its shape

    If crop or pad would change a side by less than 8 pixels, it is only cut or padded, not resampled.
    Raises ValueError for an unknown mode or an invalid working size.
    """
    width, height = picture
    if any(side % 8 or not SMALLEST_SIDE <= side <= LARGEST_SIDE for side in working):
        raise ValueError(
            f"a working size has sides of {SMALLEST_SIDE} to {LARGEST_SIDE} pixels that are multiples of 8, "
            f"got {working[0]}x{working[1]}"
        )
    if mode == "stretch":
        return Placement(picture=picture, taken=(0, 0, *picture), working=working, shown=(0, 0, *working))
    ratios = (working[0] / width, working[1] / height)
    if mode == "crop":
        near = all(0 <= mine - theirs < 8 for mine, theirs in zip(picture, working, strict=True))
        scale = 1 if near else max(ratios)
        taken = tuple(min(mine, max(1, round(theirs / scale))) for mine, theirs in zip(picture, working, strict=True))
        return Placement(picture=picture, taken=middle(taken, picture), working=working, shown=(0, 0, *working))
    if mode == "pad":
        near = all(0 <= theirs - mine < 8 for mine, theirs in zip(picture, working, strict=True))
        scale = 1 if near else min(ratios)
        shown = tuple(min(theirs, max(1, round(mine * scale))) for mine, theirs in zip(picture, working, strict=True))
        return Placement(picture=picture, taken=(0, 0, *picture), working=working, shown=middle(shown, working))
    raise ValueError(f"resize mode {mode!r} does not exist; there are crop, pad and stretch")


def middle(inner: Size, outer: Size) -> Box:
    """The box of the inner size in the middle of the outer one; an odd pixel goes to the right or bottom."""
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def natural(picture: Size, native: int) -> Placement:
    """Place a picture at the default working size: all of it, in its own shape.

    native  side of the squares that the model was trained on

    A picture of half to twice as many pixels as the model was trained on keeps its size; up to 7 pixels of padding make
    its sides multiples of 8. Any other is scaled to the model's number of pixels, its sides rounded to multiples of 8:
    with far more, things appear twice; with far fewer, little is recognisable. Raises PictureError for a picture too
    long and thin for either.
    """
    width, height = picture
    keeps = native**2 / 2 <= width * height <= native**2 * 2
    scale = 1 if keeps else math.sqrt(native**2 / (width * height))
    rounded = math.ceil if keeps else round
    working = tuple(8 * rounded(side * scale / 8) for side in picture)
    if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in working):
        raise PictureError(
            f"the picture is {width}x{height}, too long and thin for a size to follow from it. Give --width and "
            "--height, and --resize-mode to say whether it is cropped, padded or stretched."
        )
    return fit(picture, working, "pad" if keeps else "stretch")
