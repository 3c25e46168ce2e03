"""What the analysis says about pictures whose content is known, because they are drawn here."""

import io
import math
import random
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from sd.pipeline.image.tensors import to_images
from sd.training.shapes.analysis import COLOURS, RELATIONS, Wanted, analyse, colour_name, components, follows, oklab
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.outlines import SHAPES

PAINTS = {
    "red": "#d63031",
    "orange": "#f3922f",
    "yellow": "#fad63c",
    "green": "#3ca550",
    "blue": "#346ad6",
    "purple": "#8c46b4",
    "white": "#f4f4f0",
    "black": "#1c1c20",
}
RADII = {"small": 0.12, "medium": 0.22, "large": 0.35}
PATTERNS = ("plain", "stripes", "dots", "checks", "gradient")
ZOOM = 3  # pictures are drawn larger and shrunk, so that edges are smooth


def paint(rng, colour):
    return tuple(min(max(value + rng.randint(-10, 10), 0), 255) for value in ImageColor.getrgb(PAINTS[colour]))


def backdrop(rng, colour, pattern, side):
    """A background of one colour, or of it and a shade 12 % darker (or, where it is dark, 18 lighter)."""
    shade = tuple(int(0.88 * value) if sum(colour) > 180 else value + 18 for value in colour)
    picture = Image.new("RGB", (side, side), colour)
    draw, step = ImageDraw.Draw(picture), side // rng.choice((6, 8, 10))
    for i, top in enumerate(range(0, side, step)):
        if pattern == "stripes" and i % 2:
            draw.rectangle((0, top, side, top + step), fill=shade)
        for j, left in enumerate(range(0, side, step)):
            if (pattern == "checks" and (i + j) % 2) or (pattern == "dots" and i % 2 and j % 2):
                kind = draw.rectangle if pattern == "checks" else draw.ellipse
                kind((left, top, left + step, top + step), fill=shade)
    if pattern == "gradient":
        for y in range(side):
            draw.line(
                (0, y, side, y), fill=tuple(round(a + (b - a) * y / side) for a, b in zip(colour, shade, strict=True))
            )
    return picture


def corners(shape, rng):
    """An outline within the unit circle, y down."""
    around = [2 * math.pi * k / 60 for k in range(60)]
    if shape == "square":
        return [(0.8 * x, 0.8 * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if shape == "diamond":
        width = rng.uniform(0.75, 1)
        return [(0, -1), (width, 0), (0, 1), (-width, 0)]
    if shape == "triangle":
        return [(0, -0.95), (0.92, 0.75), (-0.92, 0.75)]
    if shape == "star":
        radii = (1, rng.uniform(0.4, 0.5)) * 5
        return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    if shape == "cross":
        a = rng.uniform(0.26, 0.38)
        quarter = [(a, -1), (a, -a), (1, -a)]
        turned = [[(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
        return sum(turned, quarter)
    if shape == "heart":  # (x^2 + y^2 - 1)^3 = x^2 y^3, along rays from the middle
        return [(heart_radius(t) * math.cos(t), -heart_radius(t) * math.sin(t)) for t in around]
    return [(math.cos(t), math.sin(t)) for t in around]


@cache
def heart_radius(angle):
    inner, outer = 0.0, 2.0
    for _ in range(30):
        r = (inner + outer) / 2
        x, y = r * math.cos(angle), r * math.sin(angle)
        inner, outer = (r, outer) if (x * x + y * y - 1) ** 3 < x * x * y**3 else (inner, r)
    return 0.82 * inner


def put(picture, rng, shape, colour, x, y, radius, turn=0.0):
    """Draw a thing; place and radius in fractions of the side."""
    side = picture.width
    turn = math.radians(turn)
    outline = [
        (
            side * (x + radius * (a * math.cos(turn) - b * math.sin(turn))),
            side * (y + radius * (a * math.sin(turn) + b * math.cos(turn))),
        )
        for a, b in corners(shape, rng)
    ]
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    if shape == "ring":
        hole = rng.uniform(0.5, 0.68) * radius
        box = [side * (x - hole), side * (y - hole), side * (x + hole), side * (y + hole)]
        ImageDraw.Draw(mask).ellipse(box, fill=0)
    picture.paste(colour, mask=mask)


def finish(picture):
    return np.asarray(picture.reduce(ZOOM))


def degrade(pixels, seed):
    """Blur, blotches of 8 pixels as in a JPEG, noise."""
    noise = np.random.default_rng(seed)
    soft = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))).astype(float)
    blotches = np.kron(noise.normal(0, 4, (len(pixels) // 8, len(pixels) // 8, 3)), np.ones((8, 8, 1)))
    return (soft + blotches + noise.normal(0, 12, soft.shape)).clip(0, 255).astype(np.uint8)


def one_thing(shape, colour, seed, side):
    rng = random.Random(seed)
    background = rng.choice([name for name in COLOURS if name != colour])
    picture = backdrop(rng, paint(rng, background), PATTERNS[seed % 5], side * ZOOM)
    radius = list(RADII.values())[seed % 3]
    x, y = (rng.uniform(1.05 * radius, 1 - 1.05 * radius) for _ in range(2))
    put(picture, rng, shape, paint(rng, colour), x, y, radius, rng.uniform(-12, 12))
    return finish(picture), Wanted(background=background, things=((shape, colour),)), (x, y, radius)


def two_things(seed, side):
    rng = random.Random(seed)
    background, *colours = rng.sample(COLOURS, 3)
    shapes, relation = [rng.choice(SHAPES), rng.choice(SHAPES)], RELATIONS[seed % 5]
    picture = backdrop(rng, paint(rng, background), rng.choice(PATTERNS), side * ZOOM)
    if relation == "inside":
        shapes[1] = rng.choice(("square", "circle", "heart", "diamond"))
        places = [(0.5, 0.48, 0.13), (0.5, 0.5, 0.38)]
    else:
        x, y = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
        slip = rng.uniform(-0.1, 0.1)
        radii = [rng.uniform(0.13, 0.22) for _ in range(2)]
        places = [(0.5 + x * 0.25 + y * slip, 0.5 + y * 0.25 + x * slip, radii[0])]
        places += [(0.5 - x * 0.25, 0.5 - y * 0.25, radii[1])]
    for i in (1, 0):
        put(picture, rng, shapes[i], paint(rng, colours[i]), *places[i], rng.uniform(-12, 12))
    things = tuple(zip(shapes, colours, strict=True))
    return finish(picture), Wanted(background=background, things=things, relation=relation)


def canvas(background="white", side=64):
    return Image.new("RGB", (side * ZOOM, side * ZOOM), PAINTS[background])


def all_combinations(side, seeds):
    """Every shape in every colour, once for each seed offset; sizes, patterns and backgrounds change on the way."""
    for first in seeds:
        for number, (shape, colour) in enumerate((shape, colour) for shape in SHAPES for colour in COLOURS):
            yield one_thing(shape, colour, 64 * first + number, side)


def share_right(verdicts):
    return {
        name: np.mean([getattr(v, name) for v in verdicts])
        for name in ("background", "count", "colour", "shape", "all")
    }


@pytest.mark.parametrize("side", [64, 128])
def test_clean_pictures_are_read_right(side):
    right = share_right([follows(analyse(pixels), wanted) for pixels, wanted, _ in all_combinations(side, (0,))])
    assert min(right.values()) >= 0.99, right


@pytest.mark.parametrize("side", [64, 128])
def test_noisy_blurred_and_blotched_pictures_are_read_right(side):
    pictures = enumerate(all_combinations(side, (1, 2)))
    right = share_right([follows(analyse(degrade(pixels, i)), wanted) for i, (pixels, wanted, _) in pictures])
    assert min(right.values()) >= 0.95, right


def test_pictures_from_a_poor_jpeg_are_read_right():
    verdicts = []
    for pixels, wanted, _ in list(all_combinations(128, (3,)))[::2]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=30)
        verdicts.append(follows(analyse(np.asarray(Image.open(file))), wanted))
    right = share_right(verdicts)
    assert min(right.values()) >= 0.95, right


def test_a_thin_ring_has_its_own_colour_and_not_a_mixture_with_the_background():
    """Small and blurred at 64 pixels: 2 to 3 pixels of colour, none of them pure."""
    right = []
    for background, colour in permutations(COLOURS, 2):
        picture = canvas(background)
        put(picture, random.Random(1), "ring", PAINTS[colour], 0.5, 0.5, 0.12)
        soft = Image.fromarray(finish(picture)).filter(ImageFilter.GaussianBlur(1))
        right.append(follows(analyse(np.asarray(soft)), Wanted(background=background, things=(("ring", colour),))).all)
    assert np.mean(right) >= 0.95


def test_the_second_shade_of_a_pattern_is_background_even_if_it_has_another_name():
    picture = canvas("white")
    for left in range(0, picture.width, 24):
        ImageDraw.Draw(picture).rectangle((left, 0, left + 11, picture.width), fill="#b8b8b4")  # as light as silver
    put(picture, random.Random(0), "star", PAINTS["red"], 0.5, 0.5, 0.3)
    assert follows(analyse(finish(picture)), Wanted(background="white", things=(("star", "red"),))).all


@pytest.mark.parametrize("shape", ["circle", "ring", "diamond"])
def test_centre_box_and_area_are_those_of_the_drawing(shape):
    picture = canvas()
    put(picture, random.Random(0), shape, PAINTS["blue"], 0.4, 0.55, 0.2)
    (thing,) = analyse(finish(picture)).things
    painted = np.argwhere(np.asarray(picture)[..., 0] < 150)  # white is 244, blue is 52
    (top, left), (bottom, right) = painted.min(axis=0) / picture.width, (painted.max(axis=0) + 1) / picture.width
    assert thing.centre == pytest.approx((0.4, 0.55), abs=0.005)
    assert thing.box == pytest.approx((left, top, right, bottom), abs=0.015)
    assert thing.area == pytest.approx(len(painted) / picture.width**2, rel=0.06)


def test_a_picture_need_not_be_square():
    picture = canvas(side=128)
    put(picture, random.Random(0), "star", PAINTS["red"], 0.25, 0.25, 0.2)
    (thing,) = analyse(finish(picture)[:64]).things
    assert (thing.shape, thing.colour) == ("star", "red")
    assert thing.centre == pytest.approx((0.25, 0.5), abs=0.02)


@pytest.mark.parametrize("side", [64, 128])
def test_pairs_and_their_relations_are_read_right(side):
    verdicts = [follows(analyse(pixels), wanted) for pixels, wanted in (two_things(seed, side) for seed in range(40))]
    assert np.mean([v.relation for v in verdicts]) >= 0.95
    assert np.mean([v.all for v in verdicts]) >= 0.95


def test_another_relation_than_the_drawn_one_does_not_hold():
    for seed in range(10):
        pixels, wanted = two_things(seed, 64)
        picture = analyse(pixels)
        for relation in set(RELATIONS) - {wanted.relation}:
            other = Wanted(background=wanted.background, things=wanted.things, relation=relation)
            assert not follows(picture, other).relation, (seed, wanted, relation)
            assert not follows(picture, other).all


def test_colours_given_to_the_wrong_shapes_do_not_follow():
    picture = canvas()
    put(picture, random.Random(0), "circle", PAINTS["red"], 0.27, 0.5, 0.2)
    put(picture, random.Random(0), "square", PAINTS["blue"], 0.73, 0.5, 0.2)
    picture = analyse(finish(picture))
    assert follows(picture, Wanted(background="white", things=(("square", "blue"), ("circle", "red")))).all
    verdict = follows(picture, Wanted(background="white", things=(("square", "red"), ("circle", "blue"))))
    assert (verdict.background, verdict.count, verdict.all) == (True, True, False)
    assert not (verdict.colour and verdict.shape)


def test_one_thing_too_many_makes_the_count_wrong_and_nothing_else():
    picture = canvas()
    put(picture, random.Random(0), "circle", PAINTS["red"], 0.3, 0.5, 0.22)
    put(picture, random.Random(0), "square", PAINTS["blue"], 0.78, 0.5, 0.12)
    verdict = follows(analyse(finish(picture)), Wanted(background="white", things=(("circle", "red"),)))
    assert (verdict.background, verdict.colour, verdict.shape, verdict.relation) == (True, True, True, None)
    assert (verdict.count, verdict.all) == (False, False)


def test_one_thing_too_few_makes_everything_about_the_things_wrong():
    pixels, _, _ = one_thing("circle", "red", 1, 64)
    wanted = Wanted(background="white", things=(("circle", "red"), ("circle", "red")), relation="above")
    verdict = follows(analyse(pixels), wanted)
    assert (verdict.count, verdict.colour, verdict.shape, verdict.relation, verdict.all) == (False,) * 5


def test_two_things_of_one_colour_are_two():
    picture = canvas("green")
    put(picture, random.Random(0), "heart", PAINTS["white"], 0.27, 0.5, 0.2)
    put(picture, random.Random(0), "cross", PAINTS["white"], 0.73, 0.5, 0.2)
    wanted = Wanted(background="green", things=(("heart", "white"), ("cross", "white")), relation="left of")
    assert follows(analyse(finish(picture)), wanted).all


def test_what_shows_through_a_ring_is_no_third_thing():
    picture = canvas("yellow", 128)
    put(picture, random.Random(0), "square", PAINTS["blue"], 0.5, 0.5, 0.42)
    put(picture, random.Random(0), "ring", PAINTS["red"], 0.5, 0.5, 0.2)
    wanted = Wanted(background="yellow", things=(("ring", "red"), ("square", "blue")), relation="inside")
    assert follows(analyse(finish(picture)), wanted).all


def test_a_circle_with_a_circle_of_another_colour_inside_is_no_ring():
    picture = canvas("yellow", 128)
    put(picture, random.Random(0), "circle", PAINTS["blue"], 0.5, 0.5, 0.38)
    put(picture, random.Random(0), "circle", PAINTS["red"], 0.5, 0.5, 0.2)
    wanted = Wanted(background="yellow", things=(("circle", "red"), ("circle", "blue")), relation="inside")
    assert follows(analyse(finish(picture)), wanted).all


def test_a_thing_inside_a_ring_leaves_it_a_ring():
    picture = canvas("yellow", 128)
    put(picture, random.Random(3), "ring", PAINTS["blue"], 0.5, 0.5, 0.42)
    put(picture, random.Random(0), "star", PAINTS["red"], 0.5, 0.5, 0.15)
    wanted = Wanted(background="yellow", things=(("star", "red"), ("ring", "blue")), relation="inside")
    assert follows(analyse(finish(picture)), wanted).all


def test_a_heart_cut_out_of_a_square_is_a_heart_in_the_colour_of_the_background():
    picture = canvas("yellow", 128)
    put(picture, random.Random(0), "square", PAINTS["blue"], 0.5, 0.5, 0.42)
    put(picture, random.Random(0), "heart", PAINTS["yellow"], 0.5, 0.5, 0.2)
    wanted = Wanted(background="yellow", things=(("heart", "yellow"), ("square", "blue")), relation="inside")
    assert follows(analyse(finish(picture)), wanted).all


def test_the_seam_between_black_and_white_is_no_thing():
    picture = canvas("white", 64)
    put(picture, random.Random(0), "circle", PAINTS["black"], 0.27, 0.5, 0.2)
    put(picture, random.Random(0), "circle", "#909090", 0.73, 0.5, 0.2)  # as the seam, so that the grey is looked for
    soft = Image.fromarray(finish(picture)).filter(ImageFilter.GaussianBlur(1.5))
    assert sorted(thing.colour for thing in analyse(np.asarray(soft)).things) == ["black", "grey"]


@pytest.mark.parametrize("colour", COLOURS)
def test_an_empty_picture_has_a_background_and_no_things(colour):
    picture = analyse(finish(canvas(colour)))
    assert (picture.background, picture.things) == (colour, ())
    verdict = follows(picture, Wanted(background=colour, things=(("circle", "red"),)))
    assert (verdict.background, verdict.count, verdict.colour, verdict.shape, verdict.all) == (True, *(False,) * 4)


@pytest.mark.parametrize("grain", [64, 16, 8, 4])
def test_noise_follows_no_wish(grain):
    """Noise from pixels to patches of 16 pixels: the first has no things, the others many."""
    noise, rng = np.random.default_rng(grain), random.Random(grain)
    verdicts = []
    for _ in range(4):
        pixels = Image.fromarray(noise.integers(0, 256, (grain, grain, 3), dtype=np.uint8)).resize((64, 64))
        picture = analyse(np.asarray(pixels))
        wishes = [
            Wanted(background=rng.choice(COLOURS), things=((rng.choice(SHAPES), rng.choice(COLOURS)),))
            for _ in range(25)
        ]
        verdicts += [follows(picture, wish) for wish in wishes]
    right = share_right(verdicts)
    assert right["all"] == 0
    assert max(right["shape"], right["colour"]) <= 0.25, right


def test_pictures_judged_by_the_wishes_of_others_are_right_by_chance_only():
    """Of the 63 other wishes, 7 have the same shape, 7 the same colour, none both."""
    pictures = [(analyse(pixels), wanted) for pixels, wanted, _ in all_combinations(64, (4,))]
    right = share_right([follows(picture, other) for picture, own in pictures for _, other in pictures if other != own])
    assert right["shape"] == pytest.approx(1 / 9, abs=0.005)
    assert right["colour"] == pytest.approx(1 / 9, abs=0.005)
    assert right["all"] == 0


def test_the_background_is_one_of_the_colours_even_of_a_flag():
    """The medians of red, green and blue thirds, channel by channel, are a colour that is nowhere in the picture."""
    thirds = np.repeat(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8), (22, 21, 21), axis=0)
    flag = np.tile(thirds, (64, 1, 1))
    assert analyse(flag).background in ("red", "green", "blue")


def test_an_outline_like_none_of_the_shapes_has_no_shape():
    picture = canvas("white", 128)
    ImageDraw.Draw(picture).polygon(
        [(90, 60), (120, 60), (120, 250), (330, 250), (330, 280), (90, 280)], fill="#d63031"
    )
    (thing,) = analyse(finish(picture)).things
    assert thing.colour == "red"
    assert thing.shape is None


def test_oklab_agrees_with_published_values():
    """CSS Color Module Level 4, section on named colours in oklab: white, red, lime, blue."""
    colours = oklab(np.array([(255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]))
    expected = [(1, 0, 0), (0.62796, 0.22486, 0.12585), (0.86644, -0.23389, 0.17950), (0.45201, -0.03246, -0.31153)]
    np.testing.assert_allclose(colours, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("red", "red crimson firebrick darkred"),
        ("orange", "orange darkorange coral"),
        ("yellow", "yellow gold khaki"),
        ("green", "green forestgreen seagreen limegreen yellowgreen teal"),
        ("blue", "blue royalblue dodgerblue navy skyblue steelblue"),
        ("purple", "purple rebeccapurple mediumpurple darkviolet orchid"),
        ("white", "white snow ivory whitesmoke"),
        ("black", "black #202024 #2b2b33"),
        ("grey", "grey darkgrey"),
    ],
)
def test_colours_have_the_names_that_browsers_give_them(name, words):
    assert {word: colour_name(oklab(np.array(ImageColor.getrgb(word)))) for word in words.split()} == dict.fromkeys(
        words.split(), name
    )


def test_components_are_those_of_a_flood_fill():
    classes = np.random.default_rng(0).integers(0, 2, (20, 30))
    expected = np.full(classes.shape, -1)
    for start in np.ndindex(*classes.shape):
        todo = [start] if expected[start] < 0 else []
        while todo:
            y, x = todo.pop()
            if expected[y, x] < 0:
                expected[y, x] = start[0] * 30 + start[1]
                beside = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
                todo += [(i, j) for i, j in beside if 0 <= i < 20 and 0 <= j < 30 and classes[i, j] == classes[y, x]]
    found = components(classes)
    pairs = {*zip(found.flat, expected.flat, strict=True)}
    assert len(pairs) == len(np.unique(found)) == len(np.unique(expected)) > 20


@pytest.mark.parametrize(
    "words",
    [
        {"background": "pink", "things": (("circle", "red"),)},
        {"background": "white", "things": (("hexagon", "red"),)},
        {"background": "white", "things": (("circle", "red"), ("ring", "blue")), "relation": "behind"},
        {"background": "white", "things": (("circle", "red"),), "relation": "above"},
    ],
)
def test_a_wish_that_cannot_be_measured_is_refused(words):
    with pytest.raises(ValueError, match=r"cannot measure|relates two things"):
        Wanted(**words)


@pytest.mark.parametrize(
    "pixels", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64, 4), np.uint8)]
)
def test_what_is_no_picture_is_refused(pixels):
    with pytest.raises(ValueError, match="a picture is"):
        analyse(pixels)


@pytest.mark.parametrize("size", [64, 128])
def test_the_training_pictures_are_read_as_their_captions_say(size):
    """Two pieces of code that know nothing of each other: what the one draws, the other sees."""
    pictures = ShapesDataset(1, size)
    images = to_images(pictures.batch(0, 60, slice(None))[0])
    seen = 0
    for number, image in enumerate(images):
        scene, _ = pictures.describe(number)
        if len({thing.colour for thing in scene.things}) < len(scene.things):
            continue  # two of one colour may be drawn as one
        things = tuple((thing.shape, thing.colour) for thing in scene.things)
        wanted = Wanted(background=scene.background.colour, things=things, relation=scene.relation)
        assert follows(analyse(np.asarray(image)), wanted).all, wanted
        seen += 1
    assert seen > 40
