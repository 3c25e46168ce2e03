"""Depth maps: how near each point of a picture is. Near is bright, and large.

depth = network(network_input(image, native))                       # estimated, or
depth = to_depth(given_depth_map("map.png"))                        # a map of one's own
latent_depth(depth, (height, width))                                # what the UNet reads after the latents
save_png(grey_picture(depth, picture.size), path, {})               # 16 bits
save_png(colour_picture(depth, picture.size), path, {})             # to look at

Shape letters: B pictures, H W height and width.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sd.networks.depth import SIDE_MULTIPLE
from sd.pipeline.errors import PictureError
from sd.pipeline.image.colours import deep_grey
from sd.pipeline.image.given import ALLOWED, Given, given_picture
from sd.pipeline.image.reading import MEGAPIXELS, as_rgba, check_size, decoding, flatten, read_as, upright
from sd.pipeline.image.resizing import Size

NEAREST = 65535  # the largest level of a map


def network_size(width: int, height: int, native: int) -> Size:
    """The size at which the depth network sees a picture: near `native`, the side of its training pictures.

    The picture is scaled as little as possible: so that its width is `native`, or its height, whichever changes it
    less. Each side is then rounded to a multiple of 32.

    Stability-AI/stablediffusion, ldm/modules/midas/midas/transforms.py, "minimal".
    """
    scale = min((native / height, native / width), key=lambda scale: abs(1 - scale))
    return tuple(max(SIDE_MULTIPLE, SIDE_MULTIPLE * round(scale * side / SIDE_MULTIPLE)) for side in (width, height))


def network_input(image: Tensor, native: int) -> Tensor:
    """image (B, 3, H, W) in [-1, 1] -> float32 at the network's size, a little outside [-1, 1] at sharp edges.

    Bicubic with a = -0.75, and without smoothing where it makes the picture smaller, as the weights were trained.
    """
    width, height = network_size(image.shape[-1], image.shape[-2], native)
    return _bicubic(image, (height, width))


def latent_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """What the UNet reads after the latents: the depth at their size, in each picture from -1, far, to 1, near.

    depth    (B, 1, H, W), large is near, in any unit
    size     height and width of the latents
    returns  (B, 1, *size) float32; -1 everywhere where all points are equally far

    Stability-AI/stablediffusion, ldm/models/diffusion/ddpm.py, LatentDepth2ImageDiffusion; diffusers has no 0.001.
    """
    depth = _bicubic(depth, size)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    return 2 * (depth - low) / (high - low + 0.001) - 1


def _bicubic(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values.float(), size=size, mode="bicubic", align_corners=False)


def given_depth_map(
    given: Given, name: str = "depth map", *, invert: bool = False, megapixels: float = MEGAPIXELS
) -> Image.Image:
    """A depth map of one's own.

    given       a path, a PIL image, or an array: uint8 as of any picture, or other numbers of shape (H, W)
    name        of the argument, for errors
    invert      whether dark is near in it
    megapixels  of the largest picture that is read
    returns     a picture of floats (F), 0 to 65535, large is near: levels of 16 bits as they are, those of 8 bits times
                257, other numbers so that they fill the range. Colours count by their brightness; what is transparent
                is far.

    Raises PictureError for a file that is not exactly one picture, TypeError for what is no picture.
    """
    if isinstance(given, str | os.PathLike):
        levels = read_as(Path(given), _levels, megapixels=megapixels)
    elif isinstance(given, Image.Image):
        check_size(f"the {name}", given.size, megapixels)
        with decoding(f"the {name}"):
            given.load()
            levels = _levels(f"the {name}", given)
    elif isinstance(given, np.ndarray) and given.dtype not in (np.uint8, bool):
        levels = _of_numbers(name, given)
    else:
        levels = _of_8_bits(given_picture(given, name, megapixels=megapixels))
    return Image.fromarray(NEAREST - levels if invert else levels)


def _levels(name: Path | str, picture: Image.Image) -> np.ndarray:
    """A picture opened with Pillow -> (H, W) float32"""
    levels = deep_grey(name, picture)
    if levels is not None:
        return np.asarray(upright(Image.fromarray(levels), picture)).astype(np.float32)
    if picture.mode in ("I", "F"):
        return _of_numbers(name, np.asarray(upright(picture, picture)))
    return _of_8_bits(as_rgba(name, picture, colour_managed=False))


def _of_8_bits(picture: Image.Image) -> np.ndarray:
    return np.asarray(flatten(picture, "black").convert("L")).astype(np.float32) * (NEAREST // 255)


def _of_numbers(name: Path | str, values: np.ndarray) -> np.ndarray:
    """Any numbers (H, W) -> (H, W) float32, from 0 to 65535"""
    if values.ndim != 2 or not values.size or values.dtype.kind not in "uif":
        raise TypeError(
            f"{name} is an array of {values.dtype} of shape {values.shape}. Give {ALLOWED}, or an array of numbers of "
            "shape (H, W)."
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise PictureError(f"{name} has numbers that are not finite. Give the farthest or nearest depth for them.")
    low, high = values.min(), values.max()
    return ((values - low) * (NEAREST / (high - low) if high > low else 0)).astype(np.float32)


def to_depth(depth_map: Image.Image) -> Tensor:
    """A depth map (F) -> (1, 1, H, W) float32"""
    return torch.from_numpy(np.array(depth_map, dtype=np.float32))[None, None]


def grey_picture(depth: Tensor, size: Size) -> Image.Image:
    """Depth to look at, or to give to other programs: 16 bits, from 0, far, to 65535, near.

    depth  (1, 1, H, W), large is near
    size   of the picture to make
    """
    width, height = size
    depth = _bicubic(depth, (height, width))[0, 0].double()
    low, high = depth.amin(), depth.amax()
    levels = (depth - low) * (NEAREST / (high - low) if high > low else 0)
    return Image.fromarray(levels.round().cpu().numpy().astype(np.uint16))


def colour_picture(depth: Tensor, size: Size) -> Image.Image:
    """The same in colours (RGB), from nearly black, far, over purple and orange to light yellow, near."""
    levels = np.asarray(grey_picture(depth, size))
    return Image.fromarray(colour_table()[np.rint(levels / (NEAREST // 255)).astype(np.uint8)])


@cache
def colour_table() -> np.ndarray:
    """256 colours (sRGB, uint8), from far to near, each as different from the one before as any other.

    Lightness rises evenly, so the order also shows in grey and to the colour-blind. The colours are a curve in Oklab
    whose hue turns from blue over red to yellow: Ottosson, "A perceptual color space for image processing" (2020).
    """
    place = np.linspace(0, 1, 256)
    lightness, chroma = 0.2 + 0.75 * place, 0.03 + 0.18 * np.sin(np.pi * place)
    hue = np.radians(280 + 180 * place)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    cones = np.array(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ cones.T) ** 3 @ rgb.T).clip(0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(
        "uint8"
    )
