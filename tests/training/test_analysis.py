"""What the analysis sees in pictures whose content is known: scenes as training draws them, and a few by hand.

The code that draws and the code that looks know nothing of each other, so each checks the other.
"""

import io
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from sd.pipeline.image.tensors import to_images
from sd.training.shapes.analysis import COLOURS, analyse, colour_name, components, oklab
from sd.training.shapes.drawing import ShapesDataset, render
from sd.training.shapes.judging import RELATIONS, Wanted, follows
from sd.training.shapes.outlines import SHAPES
from sd.training.shapes.scenes import COLOURS as RGB
from sd.training.shapes.scenes import PATTERNS, Background, Scene, Thing

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def scenes_of(kind):
    """160 scenes, each with what it shows; two things of one colour may touch, so they are left out."""
    found = []
    for number in range(160):
        scene, _ = ShapesDataset(1, 64, kind=kind).describe(number)
        things = tuple((thing.shape, thing.colour) for thing in scene.things)
        if len({colour for _, colour in things}) == len(things):
            found.append((scene, Wanted(background=scene.background.colour, things=things, relation=scene.relation)))
    return found


@cache
def singles_and_pairs(side):
    """Two lists of (pixels, what they show)."""
    known = scenes_of("all")
    images = map(np.asarray, to_images(render([scene for scene, _ in known], side)))
    drawn = [(pixels, wanted) for pixels, (_, wanted) in zip(images, known, strict=True)]
    return [each for each in drawn if not each[1].relation], [each for each in drawn if each[1].relation]


def draw(*things, on="white", side=64):
    """Pixels of things (shape, colour, x, y, radius) on a plain background; the first lies on top."""
    ground = Background(colour=on, pattern="plain", rgb=RGB[on], second_rgb=RGB[on], period=0.2, angle=0.0)
    drawn = tuple(
        Thing(shape=shape, colour=colour, size="any", rgb=RGB.get(colour), x=x, y=y, radius=radius, angle=0.0)
        for shape, colour, x, y, radius in things
    )
    (image,) = to_images(render([Scene(background=ground, things=drawn, relation=None)], side))
    return np.asarray(image)


def blurred(pixels, radius=1.0):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def noisy(pixels):
    """Blur, blotches of 8 pixels as in a JPEG, noise."""
    noise = np.random.default_rng(int(pixels.sum()))
    blotches = np.kron(noise.normal(0, 4, (len(pixels) // 8, len(pixels) // 8, 3)), np.ones((8, 8, 1)))
    return (blurred(pixels) + blotches + noise.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


def share_right(verdicts):
    return {
        name: np.mean([getattr(v, name) for v in verdicts])
        for name in ("background", "count", "colour", "shape", "all")
    }


def test_the_scenes_have_every_shape_colour_pattern_and_relation():
    known = scenes_of("all")
    assert {shape for _, wanted in known for shape, _ in wanted.things} == set(SHAPES)
    assert {colour for _, wanted in known for _, colour in wanted.things} == set(COLOURS) == set(RGB)
    assert {scene.background.pattern for scene, _ in known} == {"plain", *PATTERNS}
    assert {wanted.relation for _, wanted in known} == {None, *RELATIONS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "damage", "least"),
    [(64, np.array, 0.99), (128, np.array, 0.99), (64, noisy, 0.95), (128, noisy, 0.95), (128, jpeg, 0.95)],
)
def test_one_thing_is_read_correctly(side, damage, least):
    singles, _ = singles_and_pairs(side)
    right = share_right([follows(analyse(damage(pixels)), wanted) for pixels, wanted in singles])
    assert min(right.values()) >= least, right


def judged_by_eye():
    """(what a person said, pixels, what was wanted) of 100 pictures; see tests/golden/judged-pictures.txt"""
    sheet = np.asarray(Image.open(GOLDEN / "judged-pictures.webp").convert("RGB"))
    tiles = [sheet[y : y + 128, x : x + 128] for y in range(0, 1280, 128) for x in range(0, 1280, 128)]
    lines = [line for line in (GOLDEN / "judged-pictures.txt").read_text().splitlines() if not line.startswith("#")]
    for line, pixels in zip(lines, tiles, strict=True):
        eye, things, relation = (*line.split(": "), None)[:3]
        words = tuple((thing.split()[1], thing.split()[0]) for thing in things.split(", "))
        yield eye, pixels, Wanted(background="white", things=words, relation=relation)


@pytest.mark.slow
def test_the_analysis_agrees_with_a_person_about_pictures_of_a_model():
    agrees = {"right": [], "wrong": []}
    for eye, pixels, wanted in judged_by_eye():
        if eye != "doubtful":
            verdict = follows(analyse(pixels), wanted)
            right = verdict.count and verdict.colour and verdict.shape and verdict.relation is not False
            agrees[eye].append(right == (eye == "right"))
    assert len(agrees["right"]) == 62
    assert len(agrees["wrong"]) == 23
    assert np.mean(agrees["right"]) >= 0.95
    assert np.mean(agrees["wrong"]) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
def test_two_things_and_their_relation_are_read_correctly_and_no_other_relation_holds(side):
    _, pairs = singles_and_pairs(side)
    for pixels, wanted in pairs[:40]:
        picture = analyse(pixels)
        assert follows(picture, wanted).all, wanted
        for relation in set(RELATIONS) - {wanted.relation}:
            other = Wanted(background=wanted.background, things=wanted.things, relation=relation)
            assert not follows(picture, other).relation, (wanted, relation)
            assert not follows(picture, other).all


@pytest.mark.slow
def test_a_thin_ring_has_its_own_colour_and_not_a_mixture_with_the_background():
    """Small and blurred at 64 pixels: 2 to 3 pixels of colour, none of them pure."""
    right = []
    for background, colour in permutations(COLOURS, 2):
        soft = blurred(draw(("ring", colour, 0.5, 0.5, 0.12), on=background))
        right.append(follows(analyse(soft), Wanted(background=background, things=(("ring", colour),))).all)
    assert np.mean(right) >= 0.95


def test_the_second_shade_of_a_pattern_is_background_even_if_it_has_another_name():
    pixels = np.array(draw())
    pixels[:, np.arange(64) % 8 < 4] = 184  # stripes as light as silver
    star = draw(("star", "red", 0.5, 0.5, 0.3))
    pixels[star[..., 1] < 128] = (219, 36, 41)
    assert follows(analyse(pixels), Wanted(background="white", things=(("star", "red"),))).all


def test_a_thing_is_where_it_was_drawn():
    for shape in ("circle", "ring", "diamond"):
        (thing,) = analyse(draw((shape, "blue", 0.4, 0.55, 0.2))).things
        assert thing.centre == pytest.approx((0.4, 0.55), abs=0.005)


def test_a_picture_need_not_be_square():
    (thing,) = analyse(draw(("star", "red", 0.25, 0.25, 0.2), side=128)[:64]).things
    assert (thing.shape, thing.colour) == ("star", "red")
    assert thing.centre == pytest.approx((0.25, 0.5), abs=0.02)


def test_colours_given_to_the_wrong_shapes_do_not_follow():
    picture = analyse(draw(("circle", "red", 0.27, 0.5, 0.2), ("square", "blue", 0.73, 0.5, 0.2)))
    assert follows(picture, Wanted(background="white", things=(("square", "blue"), ("circle", "red")))).all
    verdict = follows(picture, Wanted(background="white", things=(("square", "red"), ("circle", "blue"))))
    assert (verdict.background, verdict.count, verdict.all) == (True, True, False)
    assert not (verdict.colour and verdict.shape)


def test_one_thing_too_many_makes_only_the_count_wrong():
    pixels = draw(("circle", "red", 0.3, 0.5, 0.22), ("square", "blue", 0.78, 0.5, 0.12))
    verdict = follows(analyse(pixels), Wanted(background="white", things=(("circle", "red"),)))
    assert (verdict.background, verdict.colour, verdict.shape, verdict.relation) == (True, True, True, None)
    assert (verdict.count, verdict.all) == (False, False)


def test_one_thing_too_few_makes_everything_about_the_things_wrong():
    wanted = Wanted(background="white", things=(("circle", "red"), ("circle", "red")), relation="above")
    verdict = follows(analyse(draw(("circle", "red", 0.5, 0.5, 0.3))), wanted)
    assert (verdict.count, verdict.colour, verdict.shape, verdict.relation, verdict.all) == (False,) * 5


@pytest.mark.parametrize(
    ("on", "first", "second", "relation"),
    [
        # two things of one colour
        ("green", ("heart", "white", 0.27, 0.5, 0.2), ("cross", "white", 0.73, 0.5, 0.2), "left of"),
        # the square shows through the ring's hole
        ("yellow", ("ring", "red", 0.5, 0.5, 0.2), ("square", "blue", 0.5, 0.5, 0.42), "inside"),
        # looks like a ring, but for the colour of its middle
        ("yellow", ("circle", "red", 0.5, 0.5, 0.2), ("circle", "blue", 0.5, 0.5, 0.38), "inside"),
        ("yellow", ("star", "red", 0.5, 0.5, 0.15), ("ring", "blue", 0.5, 0.5, 0.42), "inside"),
        # a hole in the shape of a heart is a heart in the background's colour
        ("yellow", ("heart", "yellow", 0.5, 0.5, 0.2), ("square", "blue", 0.5, 0.5, 0.42), "inside"),
    ],
)
def test_pairs_that_could_be_taken_for_something_else(on, first, second, relation):
    wanted = Wanted(background=on, things=(first[:2], second[:2]), relation=relation)
    assert follows(analyse(draw(first, second, on=on, side=128)), wanted).all


def test_the_seam_between_black_and_white_is_no_thing():
    pixels = np.array(draw(("circle", "black", 0.27, 0.5, 0.2)))
    pixels[draw(("circle", "black", 0.73, 0.5, 0.2))[..., 0] < 128] = 0x90  # as grey as the seam
    assert sorted(thing.colour for thing in analyse(blurred(pixels, 1.5)).things) == ["black", "grey"]


def test_an_empty_picture_has_a_background_and_no_things():
    for colour in COLOURS:
        picture = analyse(draw(on=colour))
        assert (picture.background, picture.things) == (colour, ())
        verdict = follows(picture, Wanted(background=colour, things=(("circle", "red"),)))
        assert (verdict.background, verdict.count, verdict.colour, verdict.shape, verdict.all) == (True, *(False,) * 4)


def test_pictures_judged_by_the_prompts_of_others_are_right_by_chance_only():
    pictures = [(analyse(pixels), wanted) for pixels, wanted in singles_and_pairs(64)[0]]
    pairs = [(picture, own, other) for picture, own in pictures for _, other in pictures if other != own]
    right = share_right([follows(picture, other) for picture, _, other in pairs])
    own_and_other = [(own.things[0], other.things[0]) for _, own, other in pairs]
    assert right["shape"] == pytest.approx(np.mean([a[0] == b[0] for a, b in own_and_other]), abs=0.005)
    assert right["colour"] == pytest.approx(np.mean([a[1] == b[1] for a, b in own_and_other]), abs=0.005)
    assert right["all"] == 0


def test_the_background_is_one_of_the_colours_even_of_a_flag():
    """The medians of red, green and blue thirds, channel by channel, are a colour that is nowhere in the picture."""
    thirds = np.repeat(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8), (22, 21, 21), axis=0)
    assert analyse(np.tile(thirds, (64, 1, 1))).background in ("red", "green", "blue")


def test_an_outline_like_none_of_the_shapes_has_no_shape():
    picture = Image.new("RGB", (128, 128), "#f4f4f0")
    corner = [(30, 20), (40, 20), (40, 83), (110, 83), (110, 93), (30, 93)]
    ImageDraw.Draw(picture).polygon(corner, fill="#d63031")
    (thing,) = analyse(np.asarray(picture)).things
    assert (thing.colour, thing.shape) == ("red", None)


def test_oklab_agrees_with_published_values():
    """CSS Color Module Level 4, section on named colours in oklab: white, red, lime, blue."""
    colours = oklab(np.array([(255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]))
    expected = [(1, 0, 0), (0.62796, 0.22486, 0.12585), (0.86644, -0.23389, 0.17950), (0.45201, -0.03246, -0.31153)]
    np.testing.assert_allclose(colours, expected, atol=2e-4)


def test_colours_have_the_names_that_browsers_give_them():
    for name, words in {
        "red": "red crimson firebrick darkred",
        "orange": "orange darkorange coral",
        "yellow": "yellow gold khaki",
        "green": "green forestgreen seagreen limegreen yellowgreen teal",
        "blue": "blue royalblue dodgerblue navy skyblue steelblue",
        "purple": "purple rebeccapurple mediumpurple darkviolet orchid",
        "white": "white snow ivory whitesmoke",
        "black": "black #202024 #2b2b33",
        "grey": "grey darkgrey",
    }.items():
        for word in words.split():
            assert colour_name(oklab(np.array(ImageColor.getrgb(word)))) == name, word


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


def test_a_wish_that_cannot_be_measured_is_refused():
    red, blue = ("circle", "red"), ("ring", "blue")
    for background, things, relation in [
        ("pink", (red,), None),
        ("white", (("hexagon", "red"),), None),
        ("white", (red, blue), "behind"),
        ("white", (red,), "above"),
    ]:
        with pytest.raises(ValueError, match=r"cannot measure|relates two things"):
            Wanted(background=background, things=things, relation=relation)


def test_arrays_of_other_shapes_and_types_are_refused():
    for shape, dtype in [((64, 64), np.uint8), ((64, 64, 3), float), ((64, 64, 4), np.uint8)]:
        with pytest.raises(ValueError, match="a picture is"):
            analyse(np.zeros(shape, dtype))
