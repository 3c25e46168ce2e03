"""Turn an ordinary model into one for depth to image: one more input channel, trained on pictures and their depth.

The code that draws the pictures also draws their depth maps, so no depth network is needed.
Stability-AI/stablediffusion, ldm/models/diffusion/ddpm.py, LatentDepth2ImageDiffusion: what the channel holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from sd.config import ModelConfig
from sd.pipeline.image.depth_maps import latent_depth
from sd.training.shapes.captions import caption
from sd.training.shapes.drawing import ShapesDataset, from_edges, pixel_centres
from sd.training.shapes.scenes import Scene
from sd.training.widening import wider_config

FARTHEST, NEAREST = 0.4, 1.0  # of a thing; the middle of the background is at 0
APART = 0.2  # least difference in depth between a thing and one that it lies on
LARGEST_SLOPE = 0.2  # change in depth across the whole picture, of the background and of every thing
SHARPEST, SOFTEST = 1 / 128, 1 / 16  # width of the maps' edges, as shares of the picture's side


def depth_config(config: ModelConfig) -> ModelConfig:
    """The same model with a channel for the depth, and without a depth network."""
    return wider_config(config, "depth", 1)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A flat surface, seen from the front or a little tilted."""

    depth: float  # at its middle; large is near
    across: float  # change in depth from the picture's left edge to the right one
    down: float  # from the top to the bottom


def planes(scene: Scene, generator: Random) -> tuple[list[Plane], Plane]:
    """A random depth for each thing of a scene, and for the background, behind all of them.

    Side by side, either thing may be the nearer one; inside another, a thing is the nearer one.
    """

    def plane(depth: float) -> Plane:
        slopes = (generator.uniform(-LARGEST_SLOPE, LARGEST_SLOPE) for _ in range(2))
        return Plane(depth=depth, across=next(slopes), down=next(slopes))

    inside = scene.relation == "inside"
    depths = [generator.uniform(FARTHEST, NEAREST - APART * inside)]  # of the last thing
    if len(scene.things) == 2:
        depths.insert(0, generator.uniform(depths[0] + APART if inside else FARTHEST, NEAREST))
    return [plane(depth) for depth in depths], plane(0.0)


def depth_map(scene: Scene, size: int, generator: Random) -> Tensor:
    """How near each pixel of a scene's picture is. Returns (size, size), large is near.

    As in the maps of a depth network, edges are more or less soft.
    """
    grid = pixel_centres(size)
    in_front, behind = planes(scene, generator)
    softness = generator.uniform(SHARPEST, SOFTEST)

    def surface(plane: Plane, x: float, y: float) -> Tensor:
        return plane.depth + plane.across * (grid - x) + plane.down * (grid[:, None] - y)

    depth = surface(behind, 0.5, 0.5)
    for thing, plane in reversed(list(zip(scene.things, in_front, strict=True))):  # the first thing lies on top
        distance, _, _, radius = from_edges([thing], grid)
        cover = (0.5 - distance * radius / softness).clamp(0, 1)[0]
        depth = depth.lerp(surface(plane, thing.x, thing.y), cover)
    return depth


class ScenesWithDepth(ShapesDataset):
    """Scenes whose captions leave the sizes of things to the depth maps.

    Of the usual captions of small things, 90 % say so. A network trained on those drew small things too large where the
    prompt did not say it.
    """

    def recaption(self, number: int, time: int) -> str:
        scene, _ = self.describe(number)
        return caption(scene, Random(f"depth caption {self.seed} {number} {time}"), sizes=False)


def show_depth(factor: int, pictures: ShapesDataset) -> Callable[[int, Tensor], Tensor]:
    """The extra input channel for pictures of scenes: their depth, as `model.depth2img` gives it to the UNet.

    factor   pixels per latent
    returns  (number of the first, pictures (b, 3, H, H)) -> (b, 1, H/factor, H/factor) from -1, far, to 1, near
    """

    def show(first: int, images: Tensor) -> Tensor:
        maps = torch.stack([map_of(pictures, first + i) for i in range(len(images))])[:, None]
        side = images.shape[-1] // factor
        return latent_depth(maps, (side, side)).to(images.device)

    return show


def map_of(pictures: ShapesDataset, number: int) -> Tensor:
    """The depth map of picture `number`: always the same."""
    scene, _ = pictures.describe(number)
    return depth_map(scene, pictures.size, Random(f"depth {pictures.seed} {number}"))
