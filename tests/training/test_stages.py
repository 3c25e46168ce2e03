"""The lessons of the small model: a table that fits together, and parts of pictures that show what they should."""

import pytest
import torch

from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scenes import KINDS
from sd.training.shapes.stages import STAGES, Parts

UNET = [stage for stage in STAGES if stage.trains == "unet"]


def test_every_stage_has_what_it_needs_and_none_comes_before_what_it_builds_on():
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert {stage.scenes for stage in STAGES} <= set(KINDS)
    kinds = [stage.trains for stage in STAGES]
    assert list(dict.fromkeys(kinds)) == ["vae", "text encoder", "unet", "decoder"]
    assert [stage.scenes for stage in UNET] == ["single", "all", "nested", "nested"]
    assert all(stage.pictures % stage.batch_size == 0 for stage in STAGES)
    assert all((stage.pictures > 0) == (stage.trains == "unet") for stage in STAGES)
    for name in dict.fromkeys(kinds):
        last = [stage for stage in STAGES if stage.trains == name][-1]
        assert last.falls_to < 0.1  # what is kept has settled


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_larger_batches_see_as_many_pictures(stage):
    larger = stage.enlarged(8)
    assert larger.batch_size == 8 * stage.batch_size
    assert 0 <= larger.steps * larger.batch_size - stage.steps * stage.batch_size < larger.batch_size
    assert larger.learning_rate == pytest.approx(8**0.5 * stage.learning_rate)
    assert stage.enlarged(1) == stage


def test_a_part_is_cut_from_its_picture_and_shows_some_of_a_thing():
    pictures = ShapesDataset(0, 64)
    parts = Parts(pictures, 32)
    whole, captions = pictures.batch(3, 24)
    cut, same = parts.batch(3, 24)
    assert (cut.shape, same) == ((24, 3, 32, 32), captions)
    for i, number in enumerate(range(72, 96)):
        x, y = parts.corner(number)
        assert torch.equal(cut[i], whole[i, :, y : y + 32, x : x + 32])
        things = pictures.describe(number)[0].things
        middle = [(at + 16) / 64 for at in (x, y)]
        edge = 1 / 128 + 16 / 64  # rounding, or a part at the picture's edge
        assert any(
            max(abs(middle[0] - thing.x), abs(middle[1] - thing.y)) <= thing.radius + edge for thing in things
        )  # fmt: skip
    assert len({parts.corner(number) for number in range(24)}) > 16


def test_the_shares_of_processes_are_the_whole_batch_of_parts():
    parts = Parts(ShapesDataset(0, 64), 32)
    images, captions = parts.batch(1, 8)
    shares = [parts.batch(1, 8, share) for share in (slice(0, 3), slice(3, 8))]
    assert [words for _, part in shares for words in part] == captions
    torch.testing.assert_close(torch.cat([part for part, _ in shares]), images, rtol=0, atol=1e-4)


def test_parts_show_more_outline_than_whole_pictures():
    """Per pixel, so they teach more in the same time."""
    pictures = ShapesDataset(0, 128, kind="single")

    def edges(images):
        return (images[..., 1:] - images[..., :-1]).abs().mean().item()

    assert edges(Parts(pictures, 64).batch(0, 64)[0]) > 1.5 * edges(pictures.batch(0, 64)[0])
