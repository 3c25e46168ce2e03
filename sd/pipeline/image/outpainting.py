"""Outpainting: a larger canvas around a picture, and the mask of the new area. The rest is inpainting."""

import numpy as np
from PIL import Image, ImageFilter

from sd.config import LARGEST_SIDE
from sd.pipeline.errors import SettingError
from sd.pipeline.image.input_settings import Expansion

FILL_BLUR = 16  # pixels, standard deviation; the streaks of repeated edges fade into the blurred picture


def expand(picture: Image.Image, expansion: Expansion, overlap: int = 32) -> tuple[Image.Image, Image.Image]:
    """The canvas and its mask.

    picture    RGB
    overlap    pixels of the old picture over which the mask fades out, along the sides that grow
    returns    RGB with the old picture unchanged in its place, and around it a smooth fill in the colours of its edges;
               and the mask (L): 255 in the new area, falling to 0 in the overlap

    Raises SettingError if the canvas would be too large.
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
    """How far each pixel of one axis is inside the sides that grow: 1 and more in the old picture, else 0 or less."""
    place = np.arange(before + length + after, dtype=np.float32)
    depth = np.full_like(place, np.inf)
    if before:
        depth = np.minimum(depth, place - before + 1)
    if after:
        depth = np.minimum(depth, before + length - place)
    return depth


def _levels(depth: np.ndarray, overlap: int) -> np.ndarray:
    """(H, W) uint8: 255 outside the old picture, falling in equal steps to 0 at depth overlap + 1."""
    share = 1 - np.clip(depth, 0, overlap + 1) / (overlap + 1)
    return np.round(255 * share).astype(np.uint8)


def _filled(picture: Image.Image, expansion: Expansion, across: np.ndarray, down: np.ndarray) -> Image.Image:
    """The edges of the picture repeated outwards, fading into the edges of the blurred picture."""
    margins = [(expansion.top, expansion.bottom), (expansion.left, expansion.right), (0, 0)]
    streaks, means = (np.pad(np.asarray(edges), margins, mode="edge") for edges in (picture, _blurred(picture)))
    distance = np.maximum(1 - np.minimum(across, down), 0)  # 1 for the first new pixel
    share = np.clip(distance / (2 * FILL_BLUR), 0, 1)
    weight = Image.fromarray(np.round(255 * share).astype(np.uint8))
    return Image.composite(Image.fromarray(means), Image.fromarray(streaks), weight)


def _blurred(picture: Image.Image) -> Image.Image:
    """Blurred with mirrored edges, so that no edge pixel counts more than its neighbours."""
    reach = 3 * FILL_BLUR
    mirrored = np.pad(np.asarray(picture), [(reach, reach), (reach, reach), (0, 0)], mode="symmetric")
    blurred = Image.fromarray(mirrored).filter(ImageFilter.GaussianBlur(FILL_BLUR))
    return blurred.crop((reach, reach, reach + picture.width, reach + picture.height))
