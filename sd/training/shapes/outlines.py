"""The eight shapes and the crescent by plain geometry, and how well each fits a thing's outline; for `analysis.py`.

h w: a picture at the resolution of the analysis, N: outlines.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
FURTHER_SHAPES = ("crescent",)  # that the embedded model never saw
KNOWN = SHAPES + FURTHER_SHAPES
SOFTENING = 1.2  # Gaussian blur in pixels: removes the noise of single pixels, keeps the points of a small star


def polygon(corners: int, *, inner: float = 1.0, turn: float = 0.0) -> NDArray:
    """Corners on a circle of radius 1, the first at the top; with every second one at `inner`, a star."""
    angle = np.arange(corners) * 2 * np.pi / corners + turn
    radius = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def cross(arm: float) -> NDArray:
    corner = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turns = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) for k in range(4)]
    return np.concatenate([corner @ turn for turn in turns])


def heart(lobes: float) -> NDArray:
    """The heart curve with swelling sides; a larger `lobes` deepens the dip between them."""
    t = np.linspace(-np.pi, np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - lobes * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 16, y / 16], axis=1)


def heart_of_circles(spread: float, depth: float) -> NDArray:
    """Two circles of radius 1 at +-spread, and their tangents from a point below."""
    touch = math.atan2(depth, -spread) - math.acos(1 / math.hypot(spread, depth))
    angle = np.linspace(touch, -math.acos(-spread), 24)
    right = np.stack([spread + np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([[(0.0, depth)], right, (right * (-1, 1))[::-1]])


def crescent(bite: float, offset: float) -> NDArray:
    """A disc of radius 1 at the origin without one of radius `bite` at (offset, 0): open to the right."""
    x = (1 + offset**2 - bite**2) / (2 * offset)  # of the tips, where the circles cross
    tip, inner = math.acos(x), math.acos((x - offset) / bite)
    outside, inside = np.linspace(tip, 2 * math.pi - tip, 40), np.linspace(2 * math.pi - inner, inner, 30)
    return np.concatenate(
        [
            np.stack([np.cos(outside), np.sin(outside)], axis=1),
            np.stack([offset + bite * np.cos(inside), bite * np.sin(inside)], axis=1),
        ]
    )


def outlines() -> list[tuple[str, list[NDArray]]]:
    """Name and contours (corners, 2), outer and hole, of every variant of each shape, before turning and stretching."""
    disc = polygon(48)
    found = [("circle", [disc]), ("square", [polygon(4, turn=np.pi / 4)]), ("triangle", [polygon(3)])]
    found += [("diamond", [polygon(4)])]
    found += [("star", [polygon(10, inner=inner)]) for inner in (0.36, 0.41, 0.46, 0.51, 0.56)]
    found += [("cross", [cross(arm)]) for arm in (0.24, 0.3, 0.36, 0.42)]
    found += [("ring", [disc, inner * disc]) for inner in np.arange(0.35, 0.9, 0.05)]
    found += [("heart", [heart(lobes)]) for lobes in (4, 5, 6)]
    found += [("heart", [heart_of_circles(spread, depth)]) for spread, depth in ((0.9, 2.4), (0.9, 2.1), (0.8, 2.2))]
    moons = [crescent(bite, offset) for bite, offset in ((0.7, 0.4), (0.8, 0.4), (0.8, 0.5), (0.9, 0.4), (0.9, 0.6))]
    found += [("crescent", [moon * (side, 1)]) for moon in moons for side in (1, -1)]
    return found


STRETCHES = {"triangle": (0.8, 0.9, 1, 1.12, 1.25), "diamond": (0.9, 1, 1.12, 1.25, 1.4, 1.6)}
STRETCHES |= {"square": (0.85, 0.92, 1, 1.09, 1.18), "heart": (0.85, 0.95, 1.05, 1.15)}  # the others: 0.92, 1, 1.09
STRETCHES |= {"crescent": (1,)}
TURNS = (-18, -12, -6, 0, 6, 12, 18)  # degrees; a square turned by 22.5 is halfway to a diamond
CELLS, REACH = 36, 1.25  # a standard view: cells per side, and half its side in roots of the thing's area
SPOT = 5  # cells; 0.35 roots of the area

LEAST_OVERLAP = 0.85  # below it, a thing is none of the shapes; they reach 0.9 even if small and blurred
# Above it, one spot of the outline is wrong: a dent in a circle, a square's round corner. Good stars, crosses and rings
# differ more from each other, so the nearest variant is further away.
MOST_FLAW = {"circle": 0.15, "square": 0.15, "diamond": 0.195, "heart": 0.24, "triangle": 0.26, "ring": 0.32}
MOST_FLAW |= {"star": 0.42, "cross": 0.42, "crescent": 0.42}


def standard_view(mask: NDArray) -> NDArray[np.float32]:
    """A mask (h, w), moved and scaled to a fixed centroid and area -> (CELLS * CELLS) in [0, 1]."""
    y, x = (float(axis.mean()) + 0.5 for axis in np.nonzero(mask))
    reach = REACH * math.sqrt(mask.sum())
    pad = math.ceil(max(reach - x, reach - y, x + reach - mask.shape[1], y + reach - mask.shape[0], 0))
    padded = Image.fromarray(np.pad(mask, pad).astype(np.float32))
    box = (x + pad - reach, y + pad - reach, x + pad + reach, y + pad + reach)
    return np.asarray(padded.resize((CELLS, CELLS), Image.Resampling.BILINEAR, box=box)).reshape(-1)


@cache
def standard_views(radius: int) -> tuple[list[str], NDArray[np.float32]]:
    """Names and views (N, CELLS * CELLS) of all shapes at this radius in pixels, blurred like a picture."""
    names, views = [], []
    side, zoom = 2 * math.ceil(2 * radius), 3
    for name, contours in outlines():
        turns = (0,) if name in ("circle", "ring") else TURNS
        for stretch, turn in product(STRETCHES.get(name, (0.92, 1, 1.09)), np.radians(turns)):
            rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
            scale = radius / max(np.linalg.norm(contours[0] * (1, stretch), axis=1))
            drawing = Image.new("L", (side * zoom, side * zoom))
            for contour, ink in zip(contours, (255, 0), strict=False):
                corners = (contour * (1, stretch) @ rotation * scale + side / 2) * zoom
                ImageDraw.Draw(drawing).polygon([tuple(corner) for corner in corners], fill=ink)
            small = drawing.resize((side, side), Image.Resampling.BOX)
            soft = np.asarray(small.filter(ImageFilter.GaussianBlur(SOFTENING + 0.6)))
            names.append(name)
            views.append(standard_view(soft > soft.max() / 2))
    return names, np.stack(views)


def worst_spot(view: NDArray, variant: NDArray) -> float:
    """Where two views differ most: the mean difference, -1 to 1, in a square of SPOT cells. A line that is slightly off
    counts little, a corner that is missing counts fully."""
    difference = (view - variant).reshape(CELLS, CELLS)
    return float(abs(sliding_window_view(difference, (SPOT, SPOT)).mean(axis=(2, 3))).max())


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The shape whose outline comes closest to a thing's, and how close."""

    shape: str  # one of KNOWN
    overlap: float  # intersection over union, 0 to 1
    flaw: float  # the worst spot, 0 to 1

    @property
    def good(self) -> bool:
        """Whether a person would call the thing by that name."""
        return self.overlap >= LEAST_OVERLAP and self.flaw <= MOST_FLAW[self.shape]


def best_fit(mask: NDArray) -> Fit:
    """Compare a mask (h, w) with every variant, turn and stretch of every shape."""
    root = math.sqrt(mask.sum())
    radius = min((9, 14, 22, 36), key=lambda radius: abs(math.log(1.4 * radius / root)))
    names, views = standard_views(radius)
    view = standard_view(mask)
    shared = views @ view
    overlaps = shared / ((views**2).sum(axis=1) + view @ view - shared)
    best = int(overlaps.argmax())
    return Fit(shape=names[best], overlap=float(overlaps[best]), flaw=worst_spot(view, views[best]))
