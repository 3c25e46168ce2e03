"""Pictures of coloured shapes, drawn by code from a seed: endless training data whose content is known exactly.

Every shape is a signed distance: how far a point is outside (positive) or inside (negative) the outline. From 1/2 to
-1/2 pixel, coverage rises from 0 to 1, so edges are one pixel soft.

Shape letters: B pictures, N things, H W the picture's height and width.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from math import cos, pi, sin, sqrt
from random import Random

import torch
from torch import Tensor

from sd.training.shapes.captions import caption
from sd.training.shapes.scenes import HOLDERS, SHAPES, Background, Scene, Thing, sample_scene

LINE = 0.09  # half the width of an outline
LIGHT, RIM, RIM_SHADE = 0.07, 0.2, 0.14  # shading: brightness in [-1, 1], the rim's width in radii


# Coordinates are in radii from the thing's centre, y downwards. Beyond a corner, distances are those to the nearer
# edge's line, which keeps corners sharp. All shapes fit into the square from -1 to 1, also when turned.


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.2


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def diamond(x: Tensor, y: Tensor) -> Tensor:
    """Taller than wide: the half-diagonals are 1 and 0.7."""
    return (x.abs() + 0.7 * (y.abs() - 1)) / sqrt(1 + 0.7**2)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, corners at distance 1."""
    return torch.maximum(y, x.abs() * cos(pi / 6) - y * sin(pi / 6)) - 0.5


def cross(x: Tensor, y: Tensor) -> Tensor:
    """Four arms of length 0.92 and half-width 0.32."""
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 0.92, torch.minimum(x, y) - 0.32)


def heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner, its sides 1.55 * sqrt(1/2) long, with half-circles on the upper two."""
    x, y = x.abs(), y - 0.0775  # the middle of its height in the origin, the square's 0.0775 below
    corner = (x + y.abs() - 0.775) / sqrt(2)
    half_circle = torch.hypot(x - 0.3875, y + 0.3875) - 0.775 / sqrt(2)
    return torch.minimum(corner, half_circle)


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points at distance 1, the corners between them at 0.45."""
    x = x.abs()
    for mirror_x in (cos(pi / 5), -cos(pi / 5)):  # mirror everything into half of the upper point
        excess = 2 * (mirror_x * x + sin(pi / 5) * y).clamp(min=0)
        x, y = x - excess * mirror_x, y - excess * sin(pi / 5)
    edge_x, edge_y = 0.45 * sin(pi / 5), 1 - 0.45 * cos(pi / 5)  # from the point down to the next corner
    return (x.abs() * edge_y - (y + 1) * edge_x) / sqrt(edge_x**2 + edge_y**2)


def crescent(x: Tensor, y: Tensor) -> Tensor:
    """A disc of radius 0.9 without one of radius 0.72, whose centre is 0.42 to the right; as wide to both sides."""
    return torch.maximum(torch.hypot(x - 0.17, y) - 0.9, 0.72 - torch.hypot(x - 0.59, y))


def hollow(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Only the outline of a shape, as a line inside it."""
    return lambda x, y: (distance(x, y) + LINE).abs() - LINE


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "diamond": diamond,
    "cross": cross,
    "ring": ring,
    "crescent": crescent,
}
DISTANCES |= {f"outlined {name}": hollow(distance) for name, distance in DISTANCES.items()}


def render(scenes: Sequence[Scene], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw scenes.

    size     the picture's side in pixels; the same scene looks the same at every size
    returns  (B, 3, size, size) float32 in [-1, 1]
    """
    grid = pixel_centres(size, device)
    image = draw_backgrounds([scene.background for scene in scenes], grid)
    for depth in (1, 0):  # the first thing lies on top of the second
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > depth]
        if rows:
            where = slice(None) if len(rows) == len(scenes) else torch.tensor(rows, dtype=torch.int64, device=device)
            image[where] = draw_things(image[where], [scenes[row].things[depth] for row in rows], grid)
    return image.clamp_(-1, 1)


def pixel_centres(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(size,), as shares of the picture's side"""
    return (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size


def draw_things(image: Tensor, things: Sequence[Thing], grid: Tensor) -> Tensor:
    """Put one thing on each picture (N, 3, H, W), in place."""
    distance, x, y, radius = from_edges(things, grid)
    cover = (distance * (radius * -len(grid))).add_(0.5).clamp_(0, 1)
    # light from the top left, and a rim that gets darker outwards: round, not flat
    depth = distance.clamp_(-RIM, 0)
    shade = (-LIGHT * x - RIM_SHADE) - LIGHT * y - depth.mul_(RIM_SHADE / RIM)
    colours = colour_tensor([thing.rgb for thing in things], grid)
    return image.lerp_(colours, cover[:, None]).addcmul_(shade[:, None], cover[:, None])


def from_edges(things: Sequence[Thing], grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each pixel is from the edge and the centre of one thing a picture.

    returns  (N, H, W) distance from the edge, negative inside; (N, 1, W) and (N, H, 1) x and y from the centre, all in
             radii; (N, 1, 1) the radii, as shares of the picture's side
    """
    names = list(DISTANCES)
    order = sorted(range(len(things)), key=lambda i: names.index(things[i].shape))  # a shape's things together
    numbers = [(thing.x, thing.y, thing.radius, cos(thing.angle), sin(thing.angle)) for thing in things]
    x, y, radius, cosine, sine = torch.tensor(numbers, dtype=torch.float32, device=grid.device).T[:, :, None, None]
    x, y = (grid - x) / radius, (grid[:, None] - y) / radius
    parts = []
    for shape, group in groupby(order, key=lambda i: things[i].shape):
        where = torch.tensor(list(group), dtype=torch.int64, device=grid.device)
        own_x, own_y, own_cosine, own_sine = (values[where] for values in (x, y, cosine, sine))
        turned = own_cosine * own_x + own_sine * own_y, own_cosine * own_y - own_sine * own_x
        parts.append(DISTANCES[shape](*turned))
    back = torch.tensor(order, dtype=torch.int64, device=grid.device).argsort()
    return torch.cat(parts)[back], x, y, radius


def draw_backgrounds(backgrounds: Sequence[Background], grid: Tensor) -> Tensor:
    """-> (B, 3, H, W)"""
    first = colour_tensor([background.rgb for background in backgrounds], grid)
    second = colour_tensor([background.second_rgb for background in backgrounds], grid)
    image = first.expand(-1, -1, len(grid), len(grid)).clone()
    for pattern, share in PATTERN_SHARES.items():
        rows = [row for row, background in enumerate(backgrounds) if background.pattern == pattern]
        if rows:
            numbers = [(one.period, cos(one.angle), sin(one.angle)) for one in (backgrounds[row] for row in rows)]
            period, cosine, sine = torch.tensor(numbers, dtype=torch.float32, device=grid.device).T[:, :, None, None]
            second_share = share(grid - 0.5, grid[:, None] - 0.5, period, cosine, sine)
            where = torch.tensor(rows, dtype=torch.int64, device=grid.device)
            image[where] = first[where].lerp(second[where], second_share[:, None])
    return image


# The share of the second shade in every pixel, from 0 to 1; x and y from the picture's middle.


def striped(x: Tensor, y: Tensor, period: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return softened(wave(cosine * x + sine * y, period), x)


def dotted(x: Tensor, y: Tensor, period: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """A dot in the middle of every square of a grid."""
    column, row = x / period % 1 - 0.5, y / period % 1 - 0.5
    return softened((0.3 - torch.hypot(column, row)) * period, x)


def checkered(x: Tensor, y: Tensor, period: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    column, row = softened(wave(x, 1.5 * period), x), softened(wave(y, 1.5 * period), x)
    return column + row - 2 * column * row


def gradient(x: Tensor, y: Tensor, period: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return (0.5 + (cosine * x + sine * y) / 1.2).clamp(0, 1)


PATTERN_SHARES = {"striped": striped, "dotted": dotted, "checkered": checkered, "gradient": gradient}


def wave(across: Tensor, period: Tensor) -> Tensor:
    """Signed distance to the edges of stripes, half a period wide, at right angles to `across`."""
    return (across / period % 1 - 0.5).abs() * period - period / 4


def softened(distance: Tensor, grid: Tensor) -> Tensor:
    return (0.5 + distance * grid.numel()).clamp(0, 1)


def colour_tensor(colours: Sequence[tuple[float, float, float]], grid: Tensor) -> Tensor:
    """Colours in [0, 1] -> (N, 3, 1, 1) in [-1, 1]"""
    return torch.tensor(colours, dtype=torch.float32, device=grid.device)[:, :, None, None] * 2 - 1


class ShapesDataset:
    """Endless pictures and captions. Picture n depends only on the seed and n.

    size      the pictures' side in pixels
    held_out  only combinations that training never shows
    kind      one of scenes.KINDS
    shapes    the shapes to use, of scenes.SHAPES. Raises ValueError if some scenes would be impossible
    """

    def __init__(
        self,
        seed: int,
        size: int,
        *,
        held_out: bool = False,
        kind: str = "all",
        shapes: tuple[str, ...] = SHAPES,
        device: torch.device | str = "cpu",
    ):
        if kind in ("pairs", "all", "nested") and not set(shapes) & set(HOLDERS):
            raise ValueError(f"scenes of kind {kind} need one of {', '.join(HOLDERS)} to hold others; got {shapes}")
        self.seed, self.size, self.device = seed, size, device
        self.scenes = {"held_out": held_out, "kind": kind, "shapes": shapes}
        self.name = f"seed {seed}, {size} pixels, scenes {kind}{', held out' * held_out}: {' '.join(shapes)}"

    def describe(self, number: int) -> tuple[Scene, str]:
        generator = Random(f"shapes {self.seed} {number}")  # strings are hashed: neighbours get unrelated pictures
        scene = sample_scene(generator, **self.scenes)
        return scene, caption(scene, generator)

    def recaption(self, number: int, time: int) -> str:
        """Another caption for the same picture; at time 0, that of `describe`."""
        scene, words = self.describe(number)
        return caption(scene, Random(f"caption {self.seed} {number} {time}")) if time else words

    def batch(self, step: int, batch_size: int, share: slice = slice(None)) -> tuple[Tensor, list[str]]:
        """Pictures step * batch_size up to (step + 1) * batch_size, or one process's share of them.

        returns  (B, 3, size, size) in [-1, 1], and B captions
        """
        numbers = range(step * batch_size, (step + 1) * batch_size)[share]
        scenes, captions = zip(*map(self.describe, numbers), strict=True)
        return render(scenes, self.size, self.device), list(captions)
