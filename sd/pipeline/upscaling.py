"""Larger latents and larger pictures, for the second of two passes."""

import torch
from PIL import Image
from torch import Tensor

MARGIN = 8  # pixels beyond an edge; a Lanczos filter reads 3


def linear_weights(before: int, after: int, *, wraps: bool) -> Tensor:
    """The matrix (after, before) of linear interpolation from `before` to `after` values.

    Values lie at the centres of equal cells. Beyond the ends is the nearest value, or, if the row wraps, the other end.
    """
    places = (torch.arange(after, dtype=torch.float64, device="cpu") + 0.5) * before / after - 0.5
    low = places.floor()
    weights = torch.zeros(after, before, dtype=torch.float64, device="cpu")
    rows = torch.arange(after, dtype=torch.int64, device="cpu")
    for index, weight in ((low, 1 - (places - low)), (low + 1, places - low)):
        column = index % before if wraps else index.clamp(0, before - 1)
        weights[rows, column.long()] += weight
    return weights


def upscale_latents(latents: Tensor, size: tuple[int, int], tile: str = "") -> Tensor:
    """Bilinear interpolation: latents (B, 4, h, w) -> (B, 4, *size).

    tile  the axes, "x" and "y", along which the picture continues at its opposite edge
    """
    rows, columns = (
        linear_weights(before, after, wraps=axis in tile).to(latents)
        for before, after, axis in zip(latents.shape[-2:], size, "yx", strict=True)
    )
    return rows @ latents @ columns.T


def upscale_picture(picture: Image.Image, size: tuple[int, int], tile: str = "") -> Image.Image:
    """The picture at another size (width, height), by a Lanczos filter; `tile` as for latents."""
    if not tile:
        return picture.resize(size, Image.Resampling.LANCZOS)
    width, height = picture.size
    across, down = (MARGIN if axis in tile else 0 for axis in "xy")
    around = Image.new("RGB", (width + 2 * across, height + 2 * down))
    for left in (across - width, across, across + width):
        for top in (down - height, down, down + height):
            around.paste(picture, (left, top))
    box = (across, down, across + width, down + height)  # the filter looks beyond it
    return around.resize(size, Image.Resampling.LANCZOS, box=box)
