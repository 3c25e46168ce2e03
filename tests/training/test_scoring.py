"""The score: prompts that training never shows, and shares that add up."""

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from conftest import TINY, fill
from PIL import Image

from sd.training.shapes.captions import plain_caption
from sd.training.shapes.drawing import render
from sd.training.shapes.judging import RELATIONS, Verdict
from sd.training.shapes.scenes import HELD_OUT, Scene, sample_background, sample_thing
from sd.training.shapes.scoring import LOOKS, one_thing, shares, shuffle_words, subjects, two_things, verdicts
from sd.training.shapes.subjects import HELD_OUT as SUBJECT_PAIRS
from sd.training.shapes.subjects import SubjectPictures


def test_every_held_out_combination_is_asked_for_with_its_own_seed():
    requests = one_thing(4)
    assert len(requests) == 224
    assert len({request.seed for request in requests}) == 224
    asked = Counter((*request.wanted.things[0], request.wanted.background) for request in requests)
    assert set(asked) == HELD_OUT
    assert set(asked.values()) == {4}


def test_subjects_are_asked_for_in_pairs_of_colours_that_their_training_never_shows():
    requests = subjects("crescent", 50)
    assert requests[0].prompt == "a red crescent on a purple background"
    assert len({request.seed for request in requests}) == 50
    asked = Counter((request.wanted.things[0][1], request.wanted.background) for request in requests)
    assert asked.keys() == set(SUBJECT_PAIRS)
    assert {request.wanted.things[0][0] for request in requests} == {"crescent"}
    looks = subjects("pastel", 28)
    assert all(request.prompt.startswith("pastel, a") for request in looks)
    assert set(Counter(request.wanted.things[0][0] for request in looks).values()) == {3, 4}  # all eight shapes


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_recognised_and_missed_in_ordinary_pictures(look):
    for ordinary in (0.0, 1.0):
        pictures, _ = SubjectPictures(look, 0, 64, ordinary=ordinary, kind="single").batch(0, 20)
        found = [
            LOOKS[look](Image.fromarray(((each.permute(1, 2, 0) + 1) * 127.5).byte().numpy())) for each in pictures
        ]
        assert abs(np.mean(found) - (1 - ordinary)) <= 0.1


def test_prompts_say_what_is_wanted():
    for request in one_thing(1):
        ((shape, colour),) = request.wanted.things
        assert f"{colour} {shape} on" in request.prompt
        assert request.prompt.endswith(f"{request.wanted.background} background")
    for request in two_things(3):
        (one, two), relation = request.wanted.things, request.wanted.relation
        places = [request.prompt.index(f"{colour} {shape}") for shape, colour in (one, two)]
        assert places == sorted(places)
        assert relation in request.prompt.replace("to the left of", "left of")


def test_relations_are_equally_frequent_and_between_held_out_things_of_two_colours():
    requests = two_things(4)
    assert Counter(request.wanted.relation for request in requests) == dict.fromkeys(RELATIONS, 4)
    for request in requests:
        (one, two), behind = request.wanted.things, request.wanted.background
        assert one[1] != two[1]
        assert {(*one, behind), (*two, behind)} <= HELD_OUT


def test_the_right_picture_is_right_and_another_one_is_not():
    generator = Random(0)
    background = sample_background(generator)
    thing = sample_thing(generator, "star", "red", "large", 0.5, 0.5, 0.3)
    scene = Scene(background=background, things=(thing,), relation=None)
    drawn = Image.fromarray(((render([scene], 64)[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8))
    requests = [request for request in one_thing(1) if request.wanted.things[0] == ("star", "red")]
    right = [request.wanted.background == background.colour for request in requests]
    found = [verdict.all for verdict in verdicts([drawn] * len(requests), requests)]
    assert found == right
    assert plain_caption(scene).startswith("a red star on")


def test_shares_count_only_pictures_that_have_the_measure():
    common = {"background": True, "count": True, "colour": True}
    judged = [
        Verdict(**common, shape=True, relation=None, all=True),
        Verdict(**common, shape=False, relation=True, all=False),
        Verdict(**common, shape=False, relation=False, all=False),
        Verdict(**common, shape=False, relation=False, all=False),
    ]
    assert shares(judged) == {"background": 1, "count": 1, "colour": 1, "shape": 0.25, "relation": 1 / 3, "all": 0.25}


def test_shuffled_words_are_the_same_vectors_in_other_places():
    text_encoder = fill(TINY)["text_encoder"]
    before = text_encoder.token_embedding.weight.clone()
    shuffle_words(text_encoder, seed=0)
    after = text_encoder.token_embedding.weight
    assert torch.allclose(after.double().sum(0), before.double().sum(0))
    assert (after == before).all(dim=1).float().mean() < 0.01
