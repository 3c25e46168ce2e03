"""Score depth to image: do the asked colours stand where a depth map has its things?

A scene's depth map is given, and the prompt asks for the same things in other colours. A picture is right if each
colour fills the thing's region of the map, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sd.pipeline.image.tensors import to_images
from sd.training.depth import map_of
from sd.training.shapes.analysis import SIDE, coloured_regions
from sd.training.shapes.captions import plain_caption
from sd.training.shapes.drawing import ShapesDataset, from_edges, pixel_centres, render
from sd.training.shapes.scenes import COLOURS, HELD_OUT, Scene


@dataclass(frozen=True, kw_only=True)
class Recolouring:
    """A picture of a scene, its depth map, and the same scene in the colours that the prompt asks for."""

    picture: Image.Image
    depth: NDArray[np.float32]  # (H, W), large is near
    asked: Scene
    prompt: str
    seed: int


def recolourings(count: int, size: int, *, kind: str = "all", seed: int = 4) -> list[Recolouring]:
    """Scenes of combinations that training never shows, with other such combinations asked for.

    kind  one of scenes.KINDS
    """
    scenes = ShapesDataset(seed, size, held_out=True, kind=kind)
    found = []
    number = -1
    while len(found) < count:
        number += 1
        scene, _ = scenes.describe(number)
        choices = other_colours(scene)
        if choices:
            asked = recoloured(scene, *Random(f"colours {number}").choice(choices))
            (picture,) = to_images(render([scene], size))
            found.append(
                Recolouring(
                    picture=picture,
                    depth=map_of(scenes, number).numpy(),
                    asked=asked,
                    prompt=plain_caption(asked),
                    seed=number,
                )
            )
    return found


def other_colours(scene: Scene) -> list[tuple[str, list[str]]]:
    """A background and a colour for each thing, all different and none as it was, so that training never shows them."""
    found = []
    for background in set(COLOURS) - {scene.background.colour}:
        colours = [
            next((colour for shape, colour, on in HELD_OUT if (shape, on) == (thing.shape, background)), thing.colour)
            for thing in scene.things
        ]
        changed = all(colour != thing.colour for colour, thing in zip(colours, scene.things, strict=True))
        if changed and len(set(colours)) == len(colours):
            found.append((background, colours))
    return sorted(found)


def recoloured(scene: Scene, background: str, colours: Sequence[str]) -> Scene:
    plain = replace(scene.background, colour=background, rgb=COLOURS[background], pattern="plain")
    things = (
        replace(thing, colour=colour, rgb=COLOURS[colour]) for thing, colour in zip(scene.things, colours, strict=True)
    )
    return replace(scene, background=plain, things=tuple(things))


def regions(scene: Scene, size: int) -> list[Tensor]:
    """The visible part of each thing, (size, size) of bool."""
    distance, *_ = from_edges(scene.things, pixel_centres(size))
    first, *second = distance < 0
    return [first, *(mask & ~first for mask in second)]  # the first thing lies on top


def overlap(picture: Image.Image, asked: Scene) -> float:
    """The intersection over union of the pixels in a thing's colour and its region: of two things, the lower one."""
    _, seen = coloured_regions(np.asarray(picture.convert("RGB")))
    found = []
    for thing, region in zip(asked.things, regions(asked, SIDE), strict=True):
        region = region.numpy()
        coloured = np.zeros_like(region)
        for mask, colour in seen:
            coloured |= mask & (colour == thing.colour)
        found.append(float((coloured & region).sum() / (coloured | region).sum()))
    return min(found)
