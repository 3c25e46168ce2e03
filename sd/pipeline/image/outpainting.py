"""Outpainting: a larger canvas around a picture, and the mask of what is new on it.

What follows is inpainting: the canvas is the picture, `resizing` and `masks` bring it to the networks and back.
"""

import numpy as np
from PIL import Image, ImageFilter

from sd.config import LARGEST_SIDE
from sd.pipeline.errors import SettingError
from sd.pipeline.image.input_settings import Expansion

FILL_BLUR = 16  # pixels, standard deviation of what the streaks of repeated edges fade into


def expand(picture: Image.Image, expansion: Expansion, overlap: int = 32) -> tuple[Image.Image, Image.Image]:
    """The canvas and its mask.

    picture    RGB
    overlap    over how many pixels of the old picture the mask fades out, along the sides that grow
    returns    RGB with the old picture in its place, not a bit changed, and around it a smooth fill in the colours of
               its edges, without noise; and the mask (L): 255 where it is new, falling to 0 in the overlap

    Raises SettingError where the canvas would be too large.
    """
    width = expansion.left + picture.width + expansion.right
    height = expansion.top + picture.height + expansion.bottom
    if max(width, height) > LARGEST_SIDE:
        raise SettingError(
            "expand",
            f"{expansion} makes {width}x{height} of {picture.width}x{picture.height}; the limit is {LARGEST_SIDE}. "
            "Add less, or scale the picture down first.",
        )
    across = _depth(expansion.left, picture.width, expansion.right)[None, :]
    down = _depth(expansion.top, picture.height, expansion.bottom)[:, None]
    return _filled(picture, expansion, across, down), Image.fromarray(_levels(np.minimum(across, down), overlap))


def _depth(before: int, length: int, after: int) -> np.ndarray:
    """How deep each pixel of one axis lies in the old picture: 1 and more inside, 0 and less in the new area.

    A side that does not grow does not count: from there, the depth is endless.
    """
    place = np.arange(before + length + after, dtype=np.float32)
    depth = np.full_like(place, np.inf)
    if before:
        depth = np.minimum(depth, place - before + 1)
    if after:
        depth = np.minimum(depth, before + length - place)
    return depth


def _levels(depth: np.ndarray, overlap: int) -> np.ndarray:
    """(H, W) uint8: 255 outside of the old picture, down in equal steps, 0 from depth overlap + 1 on."""
    share = 1 - np.clip(depth, 0, overlap + 1) / (overlap + 1)
    return np.round(255 * share).astype(np.uint8)


def _filled(picture: Image.Image, expansion: Expansion, across: np.ndarray, down: np.ndarray) -> Image.Image:
    """The edges of the picture repeated outwards; the farther away from it, the more of their surroundings' mean."""
    margins = [(expansion.top, expansion.bottom), (expansion.left, expansion.right), (0, 0)]
    streaks, means = (np.pad(np.asarray(edges), margins, mode="edge") for edges in (picture, _blurred(picture)))
    distance = np.maximum(1 - np.minimum(across, down), 0)  # 1 for the first new pixel
    share = np.clip(distance / (2 * FILL_BLUR), 0, 1)
    weight = Image.fromarray(np.round(255 * share).astype(np.uint8))
    return Image.composite(Image.fromarray(means), Image.fromarray(streaks), weight)


def _blurred(picture: Image.Image) -> Image.Image:
    """Blurred as if mirrored at its edges, so that no single pixel of an edge counts more than its neighbours."""
    reach = 3 * FILL_BLUR
    mirrored = np.pad(np.asarray(picture), [(reach, reach), (reach, reach), (0, 0)], mode="symmetric")
    blurred = Image.fromarray(mirrored).filter(ImageFilter.GaussianBlur(FILL_BLUR))
    return blurred.crop((reach, reach, reach + picture.width, reach + picture.height))
