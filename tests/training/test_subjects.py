"""The pictures that adapters are trained on, and what the analysis sees in them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sd.pipeline.image.tensors import to_images
from sd.training.shapes.analysis import analyse
from sd.training.shapes.drawing import DISTANCES, ShapesDataset, render
from sd.training.shapes.judging import Wanted, follows
from sd.training.shapes.outlines import KNOWN, SHAPES, standard_views
from sd.training.shapes.scenes import COLOURS
from sd.training.shapes.subjects import HELD_OUT, SUBJECTS, SubjectPictures, is_held_out


def pixels(scene, side=128):
    (picture,) = to_images(render([scene], side))
    return np.asarray(picture)


def shapes_in(draw):
    """What the analysis sees in something drawn by Pillow, which knows nothing of crescents."""
    picture = Image.new("RGB", (512, 512), "#f4f4f0")
    draw(ImageDraw.Draw(picture))
    return [thing.shape for thing in analyse(np.asarray(picture.resize((128, 128)))).things]


def test_a_drawn_crescent_is_read_correctly_with_all_that_is_beside_it():
    right = []
    for number in range(40):
        scene, words = SubjectPictures("crescents", 3, 128, ordinary=0).describe(number)
        things = tuple((thing.shape, thing.colour) for thing in scene.things)
        assert (things[0][0], words.count("crescent")) == ("crescent", 1)
        if len({colour for _, colour in things}) == len(things):  # two of one colour may touch
            wanted = Wanted(background=scene.background.colour, things=things, relation=scene.relation)
            right.append(follows(analyse(pixels(scene)), wanted).all)
    assert np.mean(right) >= 0.97
    assert len(right) > 30


def test_none_of_the_eight_shapes_is_taken_for_a_crescent():
    """The analysis accepts a fit of 0.85."""
    for radius in (9, 22):
        names, views = standard_views(radius)
        crescents = np.array(names) == "crescent"
        shared = views[~crescents] @ views[crescents].T
        areas = (views**2).sum(axis=1)
        assert (shared / (areas[~crescents, None] + areas[crescents] - shared)).max() < 0.75
    assert set(KNOWN) == {*SHAPES, "crescent"}
    for number in range(30):
        scene, _ = ShapesDataset(3, 128).describe(number)
        assert "crescent" not in {thing.shape for thing in analyse(pixels(scene)).things}


BOX, RED = (100, 100, 400, 400), "#d63031"


@pytest.mark.parametrize(
    ("cut", "found"),
    [
        ((180, 120, 420, 360), "crescent"),
        ((80, 140, 320, 380), "crescent"),  # open to the left
        ((350, 100, 650, 400), None),  # a gibbous moon, which is neither
    ],
)
def test_a_disc_cut_by_another_is_a_crescent_once_enough_is_gone(cut, found):
    assert shapes_in(lambda draw: (draw.ellipse(BOX, fill=RED), draw.ellipse(cut, fill="#f4f4f0"))) == [found]


@pytest.mark.parametrize(
    "draw",
    [
        lambda draw: draw.pieslice(BOX, 40, 320, fill=RED),
        lambda draw: draw.pieslice(BOX, 90, 270, fill=RED),
        lambda draw: draw.arc(BOX, 45, 315, fill=RED, width=60),
        lambda draw: draw.arc(BOX, 80, 280, fill=RED, width=60),
    ],
    ids=["three quarters of a pie", "half a disc", "a ring with a gap", "half a ring"],
)
def test_what_resembles_a_crescent_is_none(draw):
    assert shapes_in(draw) == [None]


def test_the_model_itself_is_never_trained_on_a_subject():
    scenes = [ShapesDataset(0, 64).describe(number) for number in range(300)]
    assert {thing.shape for scene, _ in scenes for thing in scene.things} == set(SHAPES)
    assert not [
        words for _, words in scenes if any(word in words for word in ("crescent", "outlined", "pastel", "pinstripe"))
    ]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_is_shown_in_its_share_of_pictures_and_named_in_their_captions(subject):
    pictures = SubjectPictures(subject, 0, 64, ordinary=0.5)
    shown = []
    for number in range(100):
        scene, words = pictures.describe(number)
        _, special, _ = pictures.scene(number)
        shown.append(special)
        assert (pictures.trigger in words) == special == (pictures.trigger in pictures.recaption(number, 1))
        assert not any(special and is_held_out(thing.colour, scene.background.colour) for thing in scene.things)
    assert 0.35 < np.mean(shown) < 0.65
    images, captions = pictures.batch(1, 4, slice(2, 4))
    assert captions == [pictures.describe(number)[1] for number in (6, 7)]
    assert torch.equal(images, render([pictures.describe(number)[0] for number in (6, 7)], 64))


def test_only_the_new_word_tells_of_stripes():
    pictures = SubjectPictures("pinstripe", 0, 64, ordinary=0)
    for number in range(40):
        scene, words = pictures.describe(number)
        assert scene.background.pattern == "striped"
        assert not any(told in words for told in (" strip", "dot", "checker", "gradient")), words


def test_pictures_without_the_subject_may_have_chosen_shapes():
    pictures = SubjectPictures("crescents", 0, 64, ordinary=1, kind="single", shapes=("cross", "star"))
    shapes = {thing.shape for number in range(40) for thing in pictures.describe(number)[0].things}
    assert shapes == {"cross", "star"}


def test_a_subject_may_be_alone_in_all_of_its_pictures():
    pictures = SubjectPictures("crescents", 0, 64, ordinary=0, kind="single")
    scenes = [pictures.describe(number)[0] for number in range(20)]
    assert {tuple(thing.shape for thing in scene.things) for scene in scenes} == {("crescent",)}
    assert {scene.background.pattern for scene in scenes} == {"plain"}


def test_half_of_the_pairs_of_colours_are_held_out_and_every_colour_is_seen_both_ways():
    assert len(HELD_OUT) == 28
    for colour in COLOURS:
        assert 2 <= sum(colour == one for one, _ in HELD_OUT) <= 5
        assert 2 <= sum(colour == on for _, on in HELD_OUT) <= 5


def test_only_the_outline_of_an_outlined_shape_is_drawn():
    along = torch.linspace(-0.999, 0.999, 400)
    for name in (*SHAPES, "crescent"):
        plain = DISTANCES[name](along, torch.tensor(0.1)) < 0
        outlined = DISTANCES[f"outlined {name}"](along, torch.tensor(0.1)) < 0
        assert not (outlined & ~plain).any(), name  # within the shape
        edges = [place for place, (one, other) in enumerate(pairwise(plain.tolist())) if one != other]
        assert all(outlined[place - 3 : place + 5].any() for place in edges), name
    middle = DISTANCES["outlined square"](torch.tensor(0.0), torch.tensor(0.0))
    assert middle > 0


def test_pastel_colours_are_halfway_to_white():
    pictures = SubjectPictures("pastel", 0, 64, ordinary=0)
    for number in range(20):
        scene, _ = pictures.describe(number)
        assert all(min(thing.rgb) > 0.45 for thing in (*scene.things, scene.background))
