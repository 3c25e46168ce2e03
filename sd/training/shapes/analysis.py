"""What a generated picture shows: its background colour, and the colour, shape and position of each thing.

Plain image analysis without a network. It judges the trained model, so it shares no code, and no mistakes, with the
drawing of the training pictures. In this order:

    colours     the picture in OKLab; the border shows the background, dense clusters elsewhere are the things' colours
    regions     each pixel goes to the nearest of these colours; connected pixels form a thing
    shapes      a thing's outline, centred and scaled, is compared with 500 outlines from plain geometry

All of it works at 128 pixels a side, whatever the picture's size. H W: picture, h w: the same at 128, N: outlines.
`judging.py` compares the result with the prompt.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sd.training.shapes.outlines import SOFTENING, Fit, best_fit

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")

SIDE = 128  # the longer side, in pixels, at which everything is measured
LEAST_AREA = 0.005  # of the picture; a small star covers 0.015, anything below this is a blemish
MOST_REGIONS = 12  # only the largest count; a picture with more is wrong anyway
LEAST_HOLE = 0.08  # of the outlined area; a ring's hole is far larger, anything below this is a blemish


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object. Places are fractions of the picture's sides, from left and top."""

    shape: str | None  # one of SHAPES, or None if nothing fits
    colour: str  # one of COLOURS, or grey
    centre: tuple[float, float]  # x, y of the centroid
    inside: frozenset[int] = frozenset()  # indices, in Picture.things, of the things around it


@dataclass(frozen=True, kw_only=True)
class Picture:
    background: str  # one of COLOURS, or grey
    things: tuple[Thing, ...]  # the largest first


def oklab(rgb: NDArray) -> NDArray[np.float32]:
    """sRGB (..., 3) in [0, 255] -> OKLab: lightness in [0, 1], green to red, blue to yellow; equal steps look equal.

    Ottosson, "A perceptual color space for image processing" (2020).
    """
    table = np.arange(256) / 255
    table = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4).astype(np.float32)
    cones = table[np.asarray(rgb, np.uint8)] @ np.array(
        [
            [0.41222147, 0.21190350, 0.08830246],
            [0.53633254, 0.68069955, 0.28171884],
            [0.05144599, 0.10739696, 0.62997870],
        ],
        np.float32,
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.21045426, 1.97799850, 0.02590404],
            [0.79361779, -2.42859221, 0.78277177],
            [-0.00407205, 0.45059371, -0.80867577],
        ],
        np.float32,
    )


# the end of each hue, in degrees in OKLab: crimson is at 19, pure red at 29, carrot at 55, amber at 76, lemon at 100,
# lime at 130, teal at 185, sky at 240, indigo at 280, violet at 293, plum at 325, pink at 0
HUES = ((40, "red"), (79, "orange"), (118, "yellow"), (200, "green"), (287, "blue"), (353, "purple"), (360, "red"))


def colour_name(lab: NDArray) -> str:
    """The name of a colour in OKLab. Grey is not one of the eight, so a blank grey picture matches no prompt."""
    lightness, chroma = float(lab[0]), math.hypot(lab[1], lab[2])
    if lightness < 0.2 or chroma < (0.06 if lightness < 0.4 else 0.045):
        return "black" if lightness < 0.45 else "white" if lightness > 0.8 else "grey"
    hue = math.degrees(math.atan2(lab[2], lab[1])) % 360
    return next(name for end, name in HUES if hue < end)


def distance_to_segment(lab: NDArray, start: NDArray, end: NDArray) -> NDArray:
    """The distance of each colour (..., 3) to the nearest mixture of two others."""
    along = end - start
    place = ((lab - start) @ along / max(float(along @ along), 1e-9)).clip(0, 1)
    return np.linalg.norm(lab - (start + place[..., None] * along), axis=-1)


def background_shades(lab: NDArray) -> tuple[NDArray, NDArray]:
    """The two extreme shades of the border: stripes, dots and gradients of a background lie between them."""
    width = SIDE // 32
    border = np.concatenate([lab[:width], lab[-width:]]).reshape(-1, 3)
    border = np.concatenate([border, lab[:, :width].reshape(-1, 3), lab[:, -width:].reshape(-1, 3)])
    distance = np.linalg.norm(border - np.median(border, axis=0), axis=1)
    border = border[distance <= max(0.17, np.quantile(distance, 0.3))]  # a thing may touch the border
    middle = border.mean(axis=0)
    axis = np.linalg.eigh(np.cov((border - middle).T) + 1e-9 * np.eye(3))[1][:, -1].astype(np.float32)
    low, high = np.quantile((border - middle) @ axis, [0.08, 0.92])
    return middle + low * axis, middle + high * axis


def deepest(mask: NDArray) -> NDArray:
    """The part of a mask (h, w), about a quarter, that lies farthest from its edge."""
    inner = deeper = mask
    while inner.sum() > mask.sum() / 4 and deeper.any():
        inner = deeper
        deeper = np.zeros_like(mask)
        beside, below = inner[1:-1, :-2] & inner[1:-1, 2:], inner[:-2, 1:-1] & inner[2:, 1:-1]
        deeper[1:-1, 1:-1] = inner[1:-1, 1:-1] & beside & below
    return inner


def dense_spots(colours: NDArray) -> list[NDArray]:
    """The centres of clusters of colours (n, 3), the densest first."""
    spots = []
    while len(colours) >= 24 and len(spots) < 6:
        _, cell, counts = np.unique((colours // 0.04).astype(int), axis=0, return_inverse=True, return_counts=True)
        spot = colours[cell.reshape(-1) == counts.argmax()].mean(axis=0)
        for _ in range(3):
            spot = colours[np.linalg.norm(colours - spot, axis=1) < 0.08].mean(axis=0)
        distance = np.linalg.norm(colours - spot, axis=1)
        if (distance < 0.08).sum() >= 24:
            spots.append(spot)
        colours = colours[distance > 0.1]
    return spots


def components(classes: NDArray) -> NDArray[np.int64]:
    """Number the connected regions of equal class (h, w); neighbours share a side."""
    place = np.arange(classes.size).reshape(classes.shape)
    beside, below = classes[:, 1:] == classes[:, :-1], classes[1:] == classes[:-1]
    one = np.concatenate([place[:, 1:][beside], place[1:][below]])
    other = np.concatenate([place[:, :-1][beside], place[:-1][below]])
    parent = place.reshape(-1).copy()
    while len(one):
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
        one, other = parent[one], parent[other]
        apart = one != other
        one, other = one[apart], other[apart]
    numbers = np.cumsum(parent == np.arange(parent.size)) - 1  # a region's first pixel is its own parent
    return numbers[parent].reshape(classes.shape)


def classify(lab: NDArray) -> tuple[NDArray, list[str]]:
    """Each pixel's class (h, w) and the classes' colour names; class 0 is the background."""
    shades = background_shades(lab)
    distances = [distance_to_segment(lab, *shades)]
    names = [colour_name((shades[0] + shades[1]) / 2)]

    # soft edges have mixed colours, so only pixels that resemble their neighbours define a thing's colour
    across, down = (np.linalg.norm(slope, axis=-1) for slope in np.gradient(lab, axis=(0, 1)))
    flat = np.hypot(across, down) < 0.025
    for spot in dense_spots(lab[flat & (distances[0] > 0.07)]):
        distance, name = np.linalg.norm(lab - spot, axis=-1), colour_name(spot)
        same = names.index(name) if name in names else None
        if same is None or (same == 0 and distance_to_segment(spot, *shades) > 0.15):
            distances.append(distance)
            names.append(name)
        else:  # another shade of the background, or of a thing with a highlight
            distances[same] = np.minimum(distances[same], distance)

    distances = np.stack(distances)
    classes = distances.argmin(axis=0)
    if len(names) > 2:
        # an edge between black and white contains every grey: a region without a flat spot goes to its neighbours
        regions = components(classes)
        area, spots = np.bincount(regions.reshape(-1)), np.bincount(regions.reshape(-1), weights=flat.reshape(-1))
        sound = (spots >= np.maximum(8, 0.1 * area))[regions]
        for i in range(len(names)):
            near = Image.fromarray((sound & (classes == i)).astype(np.uint8)).filter(ImageFilter.MaxFilter(9))
            distances[i][~sound & (np.asarray(near) == 0)] = np.inf
        classes = np.where(sound, classes, distances.argmin(axis=0))
    names[0] = colour_name(lab[classes == 0].mean(axis=0)) if (classes == 0).any() else names[0]
    return classes, names


def enclosures(masks: list[NDArray]) -> NDArray[np.bool_]:
    """(n, n): whether the first mask lies on all four sides of most of the second."""
    if not masks:
        return np.zeros((0, 0), bool)
    stack = np.stack(masks)
    sides = [np.logical_or.accumulate(stack, axis=axis) for axis in (1, 2)]
    sides += [np.flip(np.logical_or.accumulate(np.flip(stack, axis), axis=axis), axis) for axis in (1, 2)]
    around, stack = (each.reshape(len(masks), -1).astype(np.float32) for each in (np.logical_and.reduce(sides), stack))
    return (around @ stack.T > 0.8 * stack.sum(axis=1)) & ~np.eye(len(masks), dtype=bool)


def holes(mask: NDArray) -> list[NDArray]:
    """The regions outside the mask that do not reach the picture's edge."""
    regions = components(np.pad(mask, 1))  # padded, so that region 0 is what reaches the edge
    inner = np.setdiff1d(regions[~np.pad(mask, 1)], [0])
    return [regions[1:-1, 1:-1] == region for region in inner]


def outline_of(mask: NDArray, inner: NDArray) -> tuple[NDArray, Fit, list[NDArray]]:
    """A thing's visible part and what lies inside it -> its whole area, the shape that fits it best, and its holes.

    Other things and blemishes are not holes. A hole makes a circle a ring; in any other shape it is a thing itself, of
    the background's colour.
    """
    gaps = holes(mask)
    least = LEAST_HOLE * (mask.sum() + sum(gap.sum() for gap in gaps))
    through = [gap for gap in gaps if (gap & ~inner).sum() >= least]
    whole = np.logical_or.reduce([mask, inner, *gaps])
    if not through:
        return whole, best_fit(whole), []
    fit = best_fit(whole)
    if fit.shape == "circle":
        pierced = whole & ~np.logical_or.reduce(through)
        return pierced, best_fit(pierced), []
    return whole, fit, [gap for gap in through if not (gap & inner).any()]


def see_through(seen: list[tuple[NDArray, str]]) -> list[tuple[NDArray, str]]:
    """Join parts of one thing: what shows through a ring on a square is the square, not a third thing."""
    encloses = enclosures([mask for mask, _ in seen])
    kept = dict(enumerate(seen))
    for i, ring, behind in permutations(range(len(seen)), 3):
        if encloses[ring, i] and encloses[behind, ring] and seen[i][1] == seen[behind][1] and {i, behind} <= set(kept):
            kept[behind] = (kept[behind][0] | kept.pop(i)[0], seen[i][1])
    return list(kept.values())


def describe(mask: NDArray, fit: Fit, colour: str, around: NDArray) -> Thing:
    """Convert a thing's measurements to fractions of the picture. around (n): which of the n things enclose it."""
    (height, width), (y, x) = mask.shape, np.nonzero(mask)
    return Thing(
        shape=fit.shape if fit.good else None,
        colour=colour,
        centre=(float(x.mean() + 0.5) / width, float(y.mean() + 0.5) / height),
        inside=frozenset(np.flatnonzero(around).tolist()),
    )


def coloured_regions(pixels: NDArray[np.uint8]) -> tuple[str, list[tuple[NDArray, str]]]:
    """The background's colour, and the visible part (h, w) and colour of each thing in a picture (H, W, 3) of uint8.

    Raises ValueError for other arrays.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture is (H, W, 3) of uint8, got {pixels.shape} of {pixels.dtype}")
    scale = SIDE / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    sharp, soft = np.asarray(picture), np.asarray(picture.filter(ImageFilter.GaussianBlur(SOFTENING)))
    classes, names = classify(oklab(soft))
    regions = components(classes)
    least = LEAST_AREA * regions.size

    seen = []
    areas = np.bincount(regions.reshape(-1))
    for region in np.argsort(-areas)[:MOST_REGIONS]:
        if areas[region] < least:
            break
        mask = regions == region
        kind = classes.flat[mask.argmax()]
        if kind:
            # far from the edges, where even a thin ring's colour is least mixed with its surroundings
            seen.append((mask, colour_name(oklab(sharp[deepest(mask)].mean(axis=0)))))
    return names[0], seen


def analyse(pixels: NDArray[np.uint8]) -> Picture:
    """Say what a picture (H, W, 3) of uint8 shows. Raises ValueError for other arrays."""
    background, seen = coloured_regions(pixels)
    seen = see_through(seen)

    found = []  # whole area, the shape that fits best, and colour
    masks = [mask for mask, _ in seen]
    for (mask, colour), encloses in zip(seen, enclosures(masks), strict=True):
        inner = [other for other, enclosed in zip(masks, encloses, strict=True) if enclosed]
        whole, fit, gaps = outline_of(mask, np.logical_or.reduce([np.zeros_like(mask), *inner]))
        found.append((whole, fit, colour))
        found += [(gap, best_fit(gap), background) for gap in gaps if gap.sum() >= LEAST_AREA * gap.size]
    found.sort(key=lambda thing: -thing[0].sum())
    around = enclosures([whole for whole, _, _ in found]).T
    return Picture(background=background, things=tuple(describe(*found[i], around[i]) for i in range(len(found))))
