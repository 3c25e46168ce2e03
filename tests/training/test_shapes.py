"""Training pictures: the same for the same seed, drawn as described, described as drawn, and some never shown."""

import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import combinations as subsets
from math import acos, cos, pi, sin, sqrt
from random import Random

import pytest
import torch

from sd.training.shapes.captions import caption, plain_caption
from sd.training.shapes.drawing import DISTANCES, ShapesDataset, render
from sd.training.shapes.scenes import (
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    LARGEST_TURN,
    PATTERNS,
    RELATIONS,
    SHAPES,
    SIZES,
    Background,
    Scene,
    Thing,
    combinations,
    sample_scene,
)

STAR_POINTS = [  # outer and inner corners in turn
    (r * sin(i * pi / 5), -r * cos(i * pi / 5)) for i in range(10) for r in [0.45 if i % 2 else 1.0]
]
AREAS = {  # in squares of the radius
    "circle": pi * 0.9**2,
    "square": 1.6**2,
    "triangle": 3 * sqrt(3) / 4,
    # shoelace formula
    "star": 0.5 * abs(sum(a * d - b * c for (a, b), (c, d) in zip(STAR_POINTS, STAR_POINTS[1:] + STAR_POINTS[:1]))),  # noqa: B905
    "heart": 0.775**2 * 2 + pi * 0.775**2 / 2,  # a square of side 0.775 * sqrt(2) and a circle that wide
    "diamond": 2 * 0.7,
    "cross": 2 * 1.84 * 0.64 - 0.64**2,
    "ring": pi * (0.9**2 - 0.5**2),
    # a disc without its lens shared with another: two circular segments that meet in the tips, at 0.5571 of 0.42
    "crescent": pi * 0.9**2
    - (0.9**2 * acos(0.5571 / 0.9) - 0.5571 * sqrt(0.9**2 - 0.5571**2))
    - (0.72**2 * acos(-0.1371 / 0.72) + 0.1371 * sqrt(0.72**2 - 0.1371**2)),
}

GOLDEN_CAPTIONS = {
    0: "an orange background with a blue ring",
    2: "a picture of a large red diamond on a white background",
    9: "a picture of a little purple diamond left of a small green star, yellow background",
}
GOLDEN_DIGEST = "e3333bc62465"  # of 4,000 captions
GOLDEN_MEANS = [0.13387, -0.06711, -0.22535]
GOLDEN_DEVIATIONS = [0.70648, 0.59443, 0.58071]


@pytest.fixture(scope="module")
def described():
    """Many scenes of the training data with their captions."""
    return [ShapesDataset(1, 64).describe(number) for number in range(4000)]


@pytest.fixture(scope="module")
def scenes(described):
    return [scene for scene, _ in described]


def make_scene(shape="square", colour="white", on="black", size=0.3, angle=0.0, x=0.5, y=0.5):
    plain = Background(colour=on, pattern="plain", rgb=COLOURS[on], second_rgb=COLOURS[on], period=0.2, angle=0.0)
    thing = Thing(shape=shape, colour=colour, size="large", rgb=COLOURS[colour], x=x, y=y, radius=size, angle=angle)
    return Scene(background=plain, things=(thing,), relation=None)


def nearest_colours(image):
    """image (B, 3, H, W) in [-1, 1] -> (B, H, W), numbers of the nearest names"""
    palette = torch.tensor(list(COLOURS.values())) * 2 - 1
    return torch.cdist(image.permute(0, 2, 3, 1), palette).argmin(dim=-1)


def distance(thing, x, y):
    """Distance of points from a thing's outline, in units of the picture's side; negative on the thing."""
    x, y = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    turned = cos(thing.angle) * x + sin(thing.angle) * y, cos(thing.angle) * y - sin(thing.angle) * x
    return DISTANCES[thing.shape](*turned) * thing.radius


def points(low, high, count):
    line = low + (high - low) * (torch.arange(count) + 0.5) / count
    return torch.meshgrid(line, line, indexing="xy")


# the same for the same seed


def test_a_batch_depends_on_seed_and_step_alone():
    images, captions = ShapesDataset(3, 32).batch(5, 8)
    dataset = ShapesDataset(3, 32)
    dataset.batch(4, 8)
    again, same_captions = dataset.batch(5, 8)
    assert torch.equal(images, again)
    assert captions == same_captions
    for other in (ShapesDataset(4, 32).batch(5, 8), dataset.batch(6, 8)):
        assert not torch.equal(images, other[0])
        assert captions != other[1]


def test_the_same_seed_makes_the_same_data_on_every_machine(described):
    """Recorded when they were first drawn. If these change, the same seed gives other training data."""
    images, captions = ShapesDataset(0, 64).batch(0, 64)
    assert {number: captions[number] for number in GOLDEN_CAPTIONS} == GOLDEN_CAPTIONS
    assert sha256("\n".join(words for _, words in described).encode()).hexdigest().startswith(GOLDEN_DIGEST)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.tensor(GOLDEN_MEANS), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.tensor(GOLDEN_DEVIATIONS), rtol=0, atol=1e-4)


def test_the_shares_of_processes_are_the_whole_batch():
    """So a picture is also the same alone and in a batch."""
    dataset = ShapesDataset(0, 32)
    images, captions = dataset.batch(2, 12)
    shares = [dataset.batch(2, 12, share) for share in (slice(0, 1), slice(1, 4), slice(4, 12))]
    assert [words for _, part in shares for words in part] == captions
    assert dataset.batch(4, 6)[1] + dataset.batch(5, 6)[1] == captions  # batches of any size follow each other
    # a tail of a vector may be computed by other instructions than its body
    torch.testing.assert_close(torch.cat([part for part, _ in shares]), images, rtol=0, atol=1e-4)


# held-out combinations


def test_an_eighth_of_the_combinations_is_held_out_and_any_two_of_its_three_parts_are_shown():
    assert (len(COMBINATIONS), len(HELD_OUT)) == (448, 56)
    shown = set(COMBINATIONS) - HELD_OUT
    assert len(shown) == 448 - 56
    for kept in subsets(range(3), 2):
        count_all = Counter(tuple(combination[i] for i in kept) for combination in COMBINATIONS)
        count_shown = Counter(tuple(combination[i] for i in kept) for combination in shown)
        assert all(count_shown[pair] >= count - 1 for pair, count in count_all.items())
    for i in range(3):
        assert all(6 <= count <= 8 for count in Counter(combination[i] for combination in HELD_OUT).values())


def test_training_never_shows_a_held_out_combination(scenes):
    shown = Counter(combination for scene in scenes for combination in combinations(scene))
    assert set(shown) == set(COMBINATIONS) - HELD_OUT


def test_a_thing_inside_another_is_seen_on_its_colour():
    inner, outer = (
        make_scene(*what, size=size).things[0] for what, size in ((("star", "red"), 0.1), (("circle",), 0.3))
    )
    scene = replace(make_scene(on="blue"), things=(inner, outer), relation="inside")
    on_background = {("star", "red", "blue"), ("circle", "white", "blue")}
    assert combinations(scene) == on_background | {("star", "red", "white")}
    hollow = replace(outer, shape="ring")
    assert ("star", "red", "white") not in combinations(replace(scene, things=(inner, hollow)))


def test_held_out_scenes_have_nothing_else_on_their_background():
    generator = Random(0)
    drawn = [sample_scene(generator, held_out=True) for _ in range(3000)]
    assert {(t.shape, t.colour, scene.background.colour) for scene in drawn for t in scene.things} == HELD_OUT
    assert {scene.relation for scene in drawn} == {None, *RELATIONS}


# scenes


def test_things_fit_differ_and_stand_out(scenes):
    for scene in scenes:
        assert len(scene.things) == (1 if scene.relation is None else 2)
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)
        assert all(colour != behind for _, colour, behind in combinations(scene))
        for thing in scene.things:
            assert min(thing.x, thing.y) - thing.radius > 0.0199
            assert max(thing.x, thing.y) + thing.radius < 0.9801


def test_relations_are_true(scenes):
    beside = [scene for scene in scenes if scene.relation not in (None, "inside")]
    assert len({scene.relation for scene in beside}) == 4
    for scene in beside:
        one, two = scene.things
        assert HOLDS[scene.relation](one, two)
        along, across = abs(one.x - two.x), abs(one.y - two.y)
        if scene.relation in ("above", "below"):
            along, across = across, along
        assert across < 0.5 * along


def test_the_inner_thing_lies_wholly_inside_the_outer_one(scenes):
    grid = points(0, 1, 64)
    pairs = [scene.things for scene in scenes if scene.relation == "inside"]
    assert len({outer.shape for _, outer in pairs}) == 6
    for inner, outer in pairs[:200]:
        filled = replace(outer, shape="circle", radius=0.5 * outer.radius / 0.9) if outer.shape == "ring" else outer
        assert not ((distance(inner, *grid) < 0) & (distance(filled, *grid) > 0)).any()
        assert inner.colour != outer.colour


def test_sizes_are_what_they_are_called(scenes):
    for scene in scenes:
        outer = scene.things[1:] if scene.relation == "inside" else ()
        assert all(thing.size == "large" and thing.radius > SIZES["large"][1] for thing in outer)
        for thing in scene.things[: 2 - len(outer)]:
            assert SIZES[thing.size][0] <= thing.radius <= SIZES[thing.size][1]
    lows, highs = zip(*SIZES.values(), strict=True)
    assert all(low > 1.2 * high for low, high in zip(lows[1:], highs, strict=False))


# captions

THING = re.compile(rf"(?:(small|little|medium-sized|large|big) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
BACKGROUND = re.compile(
    rf"(?:(plain|striped|dotted|checkered) )?({'|'.join(COLOURS)}) (?:(striped|dotted|checkered|gradient) )?background"
    r"(?: with (stripes|dots|a checkered pattern|a gradient))?"
)
SIZE_OF = {"little": "small", "medium-sized": "medium", "big": "large"}
PATTERN_OF = {"stripes": "striped", "dots": "dotted", "a checkered pattern": "checkered", "a gradient": "gradient"}
HOLDS = {
    "left of": lambda a, b: a.x + a.radius < b.x - b.radius,
    "right of": lambda a, b: a.x - a.radius > b.x + b.radius,
    "above": lambda a, b: a.y + a.radius < b.y - b.radius,
    "below": lambda a, b: a.y - a.radius > b.y + b.radius,
    "inside": lambda a, b: abs(a.x - b.x) + abs(a.y - b.y) < 0.1 and a.radius < b.radius / 2,
}
SAYS = {  # A and B in the order in which they are named -> (relation, is it A's to B)
    r"A (?:to the )?left of B": ("left of", True),
    r"A (?:to the )?right of B": ("right of", True),
    r"A above B": ("above", True),
    r"A (?:below|under) B": ("below", True),
    r"A (?:inside|in|within) B": ("inside", True),
    r"A (?:around B|with B inside)": ("inside", False),
    r"A on the left and B on the right": ("left of", True),
    r"A on the right and B on the left": ("right of", True),
    r"A at the top and B at the bottom": ("above", True),
    r"A at the bottom and B at the top": ("below", True),
}


def skeleton(words):
    """A caption with its things called A and B and its background GROUND, without articles."""
    names = iter("AB")
    words = BACKGROUND.sub("GROUND", words)
    return re.sub(r"\b(an?|the) (?=A|B|GROUND)", "", THING.sub(lambda _: next(names), words))


def test_captions_name_all_things_and_only_what_is_there(described):
    for scene, words in described:
        named = THING.findall(words)
        assert sorted((colour, shape) for _, colour, shape in named) == sorted(
            (t.colour, t.shape) for t in scene.things
        )
        for size, colour, shape in named:
            (thing,) = [thing for thing in scene.things if (thing.colour, thing.shape) == (colour, shape)]
            assert not size or SIZE_OF.get(size, size) == thing.size
        for before, colour, between, after in BACKGROUND.findall(words):
            assert colour == scene.background.colour
            pattern = before or between or PATTERN_OF.get(after)
            assert not pattern or pattern == scene.background.pattern
        assert not re.search("|".join((*COLOURS, *SHAPES)), THING.sub("", BACKGROUND.sub("", words)))


def test_captions_say_where_things_are(described):
    said = Counter()
    for scene, words in described:
        if scene.relation is None:
            (thing,) = scene.things
            for place, true in {
                "left": thing.x < 0.41,
                "right": thing.x > 0.59,
                "top": thing.y < 0.41,
                "bottom": thing.y > 0.59,
                "middle": max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.06,
            }.items():
                if re.search(rf"\b{place}\b", words):
                    said[place] += 1
                    assert true
            continue
        things = {(thing.colour, thing.shape): thing for thing in scene.things}
        named = [things[match[1:]] for match in THING.findall(words)]
        for pattern, (relation, forward) in SAYS.items():
            if re.search(pattern, skeleton(words)):
                said[pattern] += 1
                assert HOLDS[relation](*(named if forward else named[::-1]))
                break
        else:
            assert "A and B" in skeleton(words)
            said["A and B"] += 1
    assert all(said[key] > 10 for key in (*SAYS, "left", "right", "top", "bottom", "middle"))
    assert said["A and B"] < 0.15 * sum(scene.relation is not None for scene, _ in described)


def test_captions_are_varied_and_well_formed(described):
    forms = Counter(skeleton(words) for _, words in described)
    assert len(forms) > 250
    assert max(forms.values()) < 0.12 * len(described)
    for _, words in described:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,|\ba an?\b", words), words
        assert words == words.strip()
    scene = described[0][0]
    assert len({caption(scene, Random(seed)) for seed in range(100)}) > 30


def test_plain_captions_have_one_wording():
    scene = make_scene("ring", "orange", "yellow")
    assert plain_caption(scene) == "an orange ring on a yellow background"
    (thing,) = scene.things
    pair = replace(scene, things=(thing, replace(thing, shape="star", colour="blue")), relation="left of")
    assert plain_caption(pair) == "an orange ring to the left of a blue star on a yellow background"
    assert plain_caption(replace(pair, relation="inside")) == "an orange ring inside a blue star on a yellow background"


# drawing


@pytest.mark.parametrize("shape", AREAS)
def test_shapes_have_the_area_of_their_closed_form_and_fit_into_their_square(shape):
    x, y = points(-1.2, 1.2, 1200)
    area = (DISTANCES[shape](x, y) < 0).float().mean().item() * 2.4**2
    assert area == pytest.approx(AREAS[shape], rel=2e-3)
    (image,) = render([make_scene(shape, size=0.33, angle=0.1, x=0.47)], 128)[:, 1]
    drawn = (image > 0).float().mean().item()  # half-way from black to white
    assert drawn == pytest.approx(AREAS[shape] * 0.33**2, rel=0.015)
    outside = torch.maximum(x.abs(), y.abs()) > 1.001
    turn = LARGEST_TURN.get(shape, pi / 18)
    for angle in (-turn, 0, turn):
        (thing,) = make_scene(shape, size=1.0, angle=angle, x=0.0, y=0.0).things
        assert not ((distance(thing, x, y) < 0) & outside).any()


def test_a_scene_is_the_same_picture_at_every_resolution(scenes):
    large = render(scenes[:32], 256)
    for factor in (2, 4):
        small = render(scenes[:32], 256 // factor)
        difference = (torch.nn.functional.avg_pool2d(large, factor) - small).abs()
        assert difference.mean() < 0.004
        assert difference.max() < 0.7


def test_things_are_drawn_where_the_scene_says_in_colours_nearest_to_their_names(scenes):
    names, side = list(COLOURS), 64
    scenes = scenes[:300]
    found = nearest_colours(render(scenes, side))
    grid = points(0, 1, side)
    for scene, picture in zip(scenes, found, strict=True):
        free = torch.ones_like(picture, dtype=torch.bool)
        for thing in scene.things:
            away = distance(thing, *grid) * side
            assert (picture[free & (away < -0.6)] == names.index(thing.colour)).float().mean() > 0.95
            free &= away > 0.6
        assert (picture[free] == names.index(scene.background.colour)).all()


def test_patterns_are_two_shades_of_one_colour(scenes):
    bare = {
        pattern: [replace(scene, things=()) for scene in scenes if scene.background.pattern == pattern][:40]
        for pattern in ("plain", *PATTERNS)
    }
    assert render(bare["plain"], 16).std(dim=(2, 3)).max() < 1e-6
    for pattern in PATTERNS:
        image = render(bare[pattern], 64)
        assert (image.std(dim=(2, 3)).amax(dim=1) > 0.03).all()
        first, second = (
            torch.tensor([getattr(scene.background, name) for scene in bare[pattern]])[:, :, None, None] * 2 - 1
            for name in ("rgb", "second_rgb")
        )
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        assert ((image > low - 1e-5) & (image < high + 1e-5)).all()
        if pattern != "gradient":  # most pixels are of one shade or the other
            pure = ((image - first).abs() < 1e-4) | ((image - second).abs() < 1e-4)
            assert pure.float().mean() > 0.6
            assert all(0.1 < share < 0.9 for share in ((image - first).abs() < 1e-4).float().mean(dim=(1, 2, 3)))


def easy_scenes(kind, **options):
    """300 scenes of a kind to begin with; all have plain backgrounds."""
    scenes = [ShapesDataset(0, 64, kind=kind, **options).describe(number)[0] for number in range(300)]
    assert {scene.background.pattern for scene in scenes} == {"plain"}
    return scenes


def test_the_easiest_scenes_have_one_thing():
    for kind, sizes in (("single", {"medium", "large"}), ("centred", {"large"})):
        things = [thing for scene in easy_scenes(kind) for thing in scene.things]
        assert len(things) == 300
        assert {thing.size for thing in things} == sizes
        assert {thing.shape for thing in things} == set(SHAPES)
        offset = max(abs(place - 0.5) for thing in things for place in (thing.x, thing.y))
        assert (offset < 0.05) == (kind == "centred")


def test_easy_pairs_are_small_only_inside():
    scenes = easy_scenes("pairs")
    assert {len(scene.things) for scene in scenes} == {2}
    assert {scene.relation for scene in scenes} == set(RELATIONS)
    assert {thing.size for scene in scenes if scene.relation != "inside" for thing in scene.things} == {"medium"}


def test_level_pairs_lie_on_a_middle_line_in_either_order():
    scenes = easy_scenes("level")
    assert {scene.relation for scene in scenes} == {"left of", "right of", "above", "below"}
    for scene in scenes:
        across = "x" if scene.relation in ("above", "below") else "y"
        assert max(abs(getattr(thing, across) - 0.5) for thing in scene.things) < 0.05
        assert HOLDS[scene.relation](*scene.things)


def test_nested_scenes_are_everything_with_more_inside():
    scenes = [ShapesDataset(0, 64, kind="nested").describe(number)[0] for number in range(1000)]
    relations = Counter(scene.relation for scene in scenes)
    assert relations[None] == pytest.approx(400, abs=50)
    assert relations["inside"] == pytest.approx(300, abs=50)
    assert set(relations) == {None, *RELATIONS}
    assert {scene.background.pattern for scene in scenes} == {"plain", *PATTERNS}
    beside = [scene for scene in scenes if scene.relation not in (None, "inside")]
    assert {thing.size for scene in beside for thing in scene.things} == set(SIZES)


def test_scenes_may_be_limited_to_some_shapes():
    for kind in ("centred", "level", "pairs"):
        scenes = easy_scenes(kind, shapes=("triangle", "star"))
        assert {thing.shape for scene in scenes for thing in scene.things} == {"triangle", "star"}
    for kind in ("pairs", "all", "nested"):  # which put things inside others
        with pytest.raises(ValueError, match=f"kind {kind} need one of circle, square"):
            ShapesDataset(0, 64, kind=kind, shapes=("star", "cross"))
