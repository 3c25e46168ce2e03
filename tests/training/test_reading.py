"""The text encoder's first lesson: labels by hand, the loss by hand, and that it learns which thing is where."""

import math
from dataclasses import replace
from random import Random

import pytest
import torch
import training_example
from torch import nn

import sd
from sd.config import SD_V1
from sd.text.tokenizer import Tokenizer
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.reading import NOTHING, PLACES, ReadingLoss, labels_of, reading_run
from sd.training.shapes.scenes import COLOURS, SHAPES, SIZES, sample_scene

OPTIONS = replace(training_example.options(30), learning_rate=3e-3)


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def text_encoder():
    return sd.load(precision="fp32").text_encoder.requires_grad_(True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(context_length=77, pad_token=SD_V1.text_encoder.pad_token)


class Reading(nn.Module):
    """A text encoder with a fixed output."""

    def __init__(self, answer):
        super().__init__()
        self.final_norm = nn.LayerNorm(answer.shape[-1])
        self.answer = nn.Parameter(answer)

    def forward(self, tokens):
        return self.answer


def scene_of(relation):
    generator = Random(0)
    while (scene := sample_scene(generator)).relation != relation:
        pass
    return scene


@pytest.mark.parametrize(
    ("relation", "where"),
    [
        ("left of", ["left", "right"]),
        ("right of", ["right", "left"]),
        ("above", ["top", "bottom"]),
        ("below", ["bottom", "top"]),
        ("inside", ["inner", "outer"]),
        (None, ["alone"]),
    ],
)
def test_every_thing_is_labelled_in_its_place(relation, where):
    scene = scene_of(relation)
    labels = {place: tuple(row) for place, row in zip(PLACES, labels_of(scene).tolist(), strict=True)}
    shapes, colours, sizes, none = list(SHAPES), list(COLOURS), list(SIZES), NOTHING
    assert (shapes.index("star"), colours.index("red"), sizes.index("large")) == (3, 0, 2)
    for place, thing in zip(where, scene.things, strict=True):
        said = shapes.index(thing.shape), colours.index(thing.colour), sizes.index(thing.size), none
        assert labels.pop(place)[:4] == said
    patterns = ["plain", "striped", "dotted", "checkered", "gradient"]
    behind = colours.index(scene.background.colour), none, patterns.index(scene.background.pattern)
    assert labels.pop("behind") == (none, *behind, none, none)
    assert set(labels.values()) == {(none,) * 6}


@pytest.mark.parametrize(("x", "y", "thirds"), [(0.3, 0.5, [0, 1]), (0.7, 0.2, [2, 0]), (0.43, 0.5, [NOTHING] * 2)])
def test_a_place_in_the_picture_is_labelled_if_a_caption_may_name_it(x, y, thirds):
    scene = scene_of(None)
    thing = replace(scene.things[0], x=x, y=y)
    labels = labels_of(replace(scene, things=(thing,)))
    assert labels[PLACES.index("alone"), 4:].tolist() == thirds


def test_a_reader_without_a_preference_has_the_loss_of_chance():
    loss = ReadingLoss(Reading(torch.randn(2, 5, 16)))
    for said in loss.reader.answers:
        nn.init.zeros_(said.weight)
        nn.init.zeros_(said.bias)
    labels = labels_of(scene_of("above"))[None]  # no thing is alone, so nobody asks for its column and row
    expected = math.log(8) + math.log(8) + math.log(3) + math.log(5)
    assert loss(torch.zeros(1, 5), labels.expand(2, -1, -1)).item() == pytest.approx(expected, rel=1e-6)


def test_moving_away_from_the_first_output_costs_the_squared_distance():
    encoder = Reading(torch.randn(1, 5, 16))
    free, near = ReadingLoss(encoder), ReadingLoss(encoder, nearness=0.5)
    near.reader = free.reader
    labels = labels_of(scene_of("above"))[None]
    tokens = torch.zeros(1, 5)
    assert near(tokens, labels).item() == pytest.approx(free(tokens, labels).item(), rel=1e-6)
    with torch.no_grad():
        encoder.answer += 0.2
    assert near(tokens, labels).item() == pytest.approx(free(tokens, labels).item() + 0.5 * 0.04, rel=1e-5)


@pytest.mark.slow
def test_a_text_encoder_learns_to_read(text_encoder, tokenizer, tmp_path):
    """The embedded one can read already; the reader on top needs a few steps to make use of it."""
    describe = ShapesDataset(5, 128, kind="level").describe
    run = reading_run(text_encoder, tokenizer, describe, OPTIONS, tmp_path, batch_size=16, seed=0, nearness=0.1)
    losses = [row["loss"] for row in run.run()]
    assert losses[0] > 3
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]


@pytest.mark.slow
def test_a_stopped_training_continues_as_if_it_had_not_been_stopped(text_encoder, tokenizer, tmp_path):
    start = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    describe, results = ShapesDataset(5, 128).describe, []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for steps in stops:
            text_encoder.load_state_dict(start)
            options = replace(OPTIONS, learning_rate=1e-3, final_learning_rate=1e-3, steps=steps)
            settings = {"batch_size": 4, "seed": 0, "nearness": 0.3}
            run = reading_run(text_encoder, tokenizer, describe, options, tmp_path / name, **settings)
            rows = list(run.run())
        results.append((rows[-1]["loss"], run.tensors()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
