"""Random scenes for the training data: one or two coloured shapes on a background.

A scene describes its picture completely, so captions are true and generated pictures can be scored. Lengths are
fractions of the picture's side, x to the right and y downwards; colours are in [0, 1].
"""

from dataclasses import dataclass
from functools import cache
from math import pi
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
COLOURS = {
    "red": (0.86, 0.14, 0.16),
    "orange": (0.97, 0.52, 0.08),
    "yellow": (0.98, 0.86, 0.18),
    "green": (0.16, 0.62, 0.27),
    "blue": (0.14, 0.36, 0.85),
    "purple": (0.52, 0.20, 0.66),
    "white": (0.95, 0.95, 0.95),
    "black": (0.09, 0.09, 0.10),
}
SIZES = {"small": (0.10, 0.135), "medium": (0.18, 0.22), "large": (0.27, 0.33)}  # range of the radius
PATTERNS = ("striped", "dotted", "checkered", "gradient")  # other than plain
RELATIONS = ("left of", "right of", "above", "below", "inside")
KINDS = ("centred", "single", "level", "pairs", "all", "nested")  # of scenes, from easy to hard

PAIRS_OF_SIZES = [(a, b) for a in SIZES for b in SIZES if (a, b) not in (("medium", "large"), ("large", "medium"))]
PAIRS_OF_SIZES.remove(("large", "large"))  # what does not fit side by side
ALIKE = ("star", "triangle")  # the two that take longest to tell apart, by word and by outline
HOLDERS = ("circle", "square", "triangle", "heart", "diamond", "ring")  # have room for a small thing in the middle
INNER_RADIUS, HOLDER_RADIUS = (0.12, 0.135), (0.35, 0.40)  # a small thing, and a very large one around it
PALER = {"white": (0, 0.13), "black": (1, 0.16), "yellow": (1, 0.35)}  # second shade: this share of the way to 0 or 1
LARGEST_TURN = {"circle": 0.0, "ring": 0.0, "diamond": pi / 30, "star": pi / 10}  # in both directions; others pi / 18
MARGIN = 0.02  # between a thing and the picture's edge, and between two things
STRAIGHT = 0.45  # most offset of two neighbouring things across their relation, as a share of their distance along it

Rgb = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Background:
    colour: str
    pattern: str  # plain or one of PATTERNS
    rgb: Rgb
    second_rgb: Rgb  # the pattern's other shade of the same colour
    period: float  # of stripes, dots and checks
    angle: float  # of stripes and gradients, in radians


@dataclass(frozen=True, kw_only=True)
class Thing:
    shape: str
    colour: str
    size: str
    rgb: Rgb
    x: float  # centre
    y: float
    radius: float  # half the side of the square it fits into
    angle: float  # clockwise, in radians; too small to make it another shape


@dataclass(frozen=True, kw_only=True)
class Scene:
    background: Background
    things: tuple[Thing, ...]  # one or two; the first lies on top of the second
    relation: str | None  # one of RELATIONS: where the first is, relative to the second


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether training never shows this shape in this colour on this background colour.

    One of the eight shapes for each pair of colours: 56 of 448 combinations. Any two of the three still occur together
    in training, with all but at most one choice of the third.
    """
    names = list(COLOURS)
    return (SHAPES.index(shape) + 3 * names.index(colour) - names.index(background)) % 8 == 0


COMBINATIONS = tuple((shape, colour, on) for shape in SHAPES for colour in COLOURS for on in COLOURS if colour != on)
HELD_OUT = frozenset(combination for combination in COMBINATIONS if is_held_out(*combination))


def combinations(scene: Scene) -> set[tuple[str, str, str]]:
    """Every (shape, colour, colour behind it) in a scene. A thing inside another has that one behind it."""
    found = {(thing.shape, thing.colour, scene.background.colour) for thing in scene.things}
    if scene.relation == "inside" and scene.things[1].shape != "ring":
        inner, outer = scene.things
        found.add((inner.shape, inner.colour, outer.colour))
    return found


def sample_scene(
    generator: Random, *, held_out: bool = False, kind: str = "all", shapes: tuple[str, ...] = SHAPES
) -> Scene:
    """Sample a scene: of kinds "all" and "nested", two in five have one thing, the others two.

    held_out  False: no held-out combinations; True: each thing forms one with the background
    kind      "centred": one large thing near the middle of a plain background, so that its shape always shows in the
              same place. "single": one thing, not small, anywhere on a plain background. "level": two neighbouring
              things on one of the middle lines of a plain background, so that their relation only decides which is
              where. "pairs": two things on a plain background, small ones only inside others. "all": everything.
              "nested": everything, but in half of the scenes with two things, one is inside the other
    shapes    the shapes that things may have
    """
    everything = kind in ("all", "nested")
    background = sample_background(generator, plain=not everything)
    choices = things_on(background.colour, held_out, shapes)
    if kind in ("centred", "single") or (everything and generator.random() < 0.4):
        shape, colour = generator.choice(choices)
        size = generator.choice({"centred": ["large"], "single": ["medium", "large"]}.get(kind, list(SIZES)))
        radius = generator.uniform(*SIZES[size])
        x, y = (place(generator, radius, near_middle=kind == "centred") for _ in "xy")
        thing = sample_thing(generator, shape, colour, size, x, y, radius)
        return Scene(background=background, things=(thing,), relation=None)

    relations = {"level": RELATIONS[:4], "nested": RELATIONS + 3 * ("inside",)}.get(kind, RELATIONS)
    relation = generator.choice(relations)
    if relation == "inside":
        things = sample_inside(generator, choices, held_out)
    else:
        things = sample_beside(generator, choices, relation, small=everything, level=kind == "level")
    return Scene(background=background, things=things, relation=relation)


@cache
def things_on(background: str, held_out: bool, shapes: tuple[str, ...]) -> list[tuple[str, str]]:
    """The (shape, colour) allowed on a background. In training, shapes in ALIKE come twice as often."""
    chosen = [combination for combination in COMBINATIONS if (combination in HELD_OUT) == held_out]
    return [
        (shape, colour)
        for shape, colour, on in chosen
        if on == background and shape in shapes
        for _ in range(2 if shape in ALIKE and not held_out else 1)
    ]


def place(generator: Random, radius: float, *, near_middle: bool = False) -> float:
    """One coordinate of a single thing: often near the middle, otherwise anywhere."""
    if near_middle or generator.random() < 0.3:
        return generator.uniform(0.46, 0.54)
    return generator.uniform(MARGIN + radius, 1 - MARGIN - radius)


def sample_inside(generator: Random, choices: list[tuple[str, str]], held_out: bool) -> tuple[Thing, Thing]:
    """A small thing in the middle of a large one of another colour."""
    holder, behind = generator.choice([(shape, colour) for shape, colour in choices if shape in HOLDERS])
    shape, colour = generator.choice(
        [
            (shape, colour)
            for shape, colour in choices
            if colour != behind and (held_out or holder == "ring" or (shape, colour, behind) not in HELD_OUT)
        ]
    )
    radius = generator.uniform(*HOLDER_RADIUS)
    x, y = place(generator, radius), place(generator, radius)
    outer = sample_thing(generator, holder, behind, "large", x, y, radius)
    return sample_thing(generator, shape, colour, "small", x, y, generator.uniform(*INNER_RADIUS)), outer


def sample_beside(
    generator: Random, choices: list[tuple[str, str]], relation: str, *, small: bool, level: bool
) -> tuple[Thing, Thing]:
    """Two different things next to each other, without overlap and in a clear direction.

    small  whether half of the pictures may have small things
    level  whether both are on the picture's middle line
    """
    first = generator.choice(choices)
    second = generator.choice([choice for choice in choices if choice != first])
    varied = small and generator.random() < 0.5
    sizes = generator.choice(PAIRS_OF_SIZES if varied else [("medium", "medium")])
    radii = [generator.uniform(*SIZES[size]) for size in sizes]

    # along the relation's axis: edge, first, gap, second, edge
    free = 1 - 2 * MARGIN - 2 * sum(radii)
    gap = generator.uniform(MARGIN, free)
    start = MARGIN + generator.uniform(0, free - gap)
    near, far = start + radii[0], start + 2 * radii[0] + gap + radii[1]
    # across it: the larger one anywhere, the smaller one at about the same height
    larger, smaller = max(radii), min(radii)
    reach = STRAIGHT * (far - near)
    height = generator.uniform(MARGIN + larger, 1 - MARGIN - larger)
    across = [
        height,
        generator.uniform(max(height - reach, MARGIN + smaller), min(height + reach, 1 - MARGIN - smaller)),
    ]
    if level:
        across = [place(generator, radius, near_middle=True) for radius in radii]
    if radii[0] < radii[1]:
        across.reverse()
    if relation in ("right of", "below"):
        near, far = 1 - near, 1 - far
    places = zip((near, far), across, strict=True)
    if relation in ("above", "below"):
        places = ((x, y) for y, x in places)
    one, two = (
        sample_thing(generator, *what, size, x, y, radius)
        for what, size, radius, (x, y) in zip((first, second), sizes, radii, places, strict=True)
    )
    return one, two


def sample_thing(generator: Random, shape: str, colour: str, size: str, x: float, y: float, radius: float) -> Thing:
    turn = LARGEST_TURN.get(shape, pi / 18)
    angle = generator.uniform(-turn, turn)
    rgb = vary(generator, COLOURS[colour])
    return Thing(shape=shape, colour=colour, size=size, rgb=rgb, x=x, y=y, radius=radius, angle=angle)


def sample_background(generator: Random, *, plain: bool = False) -> Background:
    colour = generator.choice(list(COLOURS))
    pattern = generator.choice(PATTERNS) if not plain and generator.random() < 0.4 else "plain"
    rgb = vary(generator, COLOURS[colour])
    end, share = PALER.get(colour, (1, 0.2))
    second = tuple(channel + share * (end - channel) for channel in rgb)
    if pattern != "plain" and generator.random() < 0.5:
        rgb, second = second, rgb
    period = generator.uniform(0.12, 0.22)
    angle = generator.choice(range(8)) * pi / 4 + generator.uniform(-pi / 24, pi / 24)
    return Background(colour=colour, pattern=pattern, rgb=rgb, second_rgb=second, period=period, angle=angle)


def vary(generator: Random, rgb: Rgb) -> Rgb:
    """A shade of a colour that still has the same name."""
    lighter = generator.uniform(-0.03, 0.03)
    return tuple(min(max(channel + lighter + generator.uniform(-0.02, 0.02), 0.0), 1.0) for channel in rgb)
