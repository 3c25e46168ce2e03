"""Training a network to edit by instruction: the pairs of pictures, what is left out, and how results are judged."""

import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from conftest import TINY, fill
from PIL import Image

from sd.pipeline.conditions import conditions_for
from sd.pipeline.image.tensors import to_images
from sd.sampling.init_image import InitImage, with_picture
from sd.training.editing import EncodedPairs, editing_config, left_out
from sd.training.latents import encode_all
from sd.training.shapes.drawing import render
from sd.training.shapes.edit_scoring import edit_of, judge, new_edits
from sd.training.shapes.edits import CHANGES, TO_COLOUR, TO_SHAPE, PicturePairs, instruction, sample_pair, what_changed
from sd.training.shapes.scenes import COLOURS, HELD_OUT, SHAPES, combinations
from sd.training.widening import widened

CONFIG = editing_config(TINY)
PAIRS = PicturePairs(0, 64)
COUNT = 200


def pairs_of(what, held_out=False):
    return [sample_pair(Random(f"{what} {number}"), what, held_out=held_out) for number in range(COUNT)]


@pytest.mark.parametrize("what", CHANGES)
def test_two_scenes_differ_in_what_the_instruction_says_and_nowhere_else(what):
    for before, after in pairs_of(what):
        words = instruction(before, after, Random(0)).split()
        if what == "background":
            assert replace(after, background=before.background) == before
            assert words[2] == "background"
            assert words[-1] == after.background.colour != before.background.colour
            continue
        (index,) = [i for i, thing in enumerate(before.things) if thing != after.things[i]]
        old, new = before.things[index], after.things[index]
        same = {"colour": old.colour, "rgb": old.rgb} if what == "colour" else {"shape": old.shape, "angle": old.angle}
        assert replace(new, **same) == old
        assert replace(after, things=before.things) == before
        meant = [thing for thing in before.things if thing.shape in words[:4]]
        meant = [thing for thing in meant if thing.colour in words[:3]] if words[2] in COLOURS else meant
        assert meant == [old]  # the words can mean no other thing
        assert words[-1] == getattr(new, what) != getattr(old, what)


@pytest.mark.parametrize("what", CHANGES)
def test_two_pictures_differ_only_where_the_scenes_do(what):
    size = 64
    y, x = (torch.arange(size)[:, None] + 0.5) / size, (torch.arange(size) + 0.5) / size
    for before, after in pairs_of(what)[:20]:
        differ = (torch.subtract(*render([before, after], size)) != 0).any(dim=0)
        assert differ.any()
        boxes = [torch.maximum((x - one.x).abs(), (y - one.y).abs()) - one.radius for one in before.things]
        if what == "background":
            corner = torch.stack(boxes).amin(dim=0) > 1 / size  # outside the squares around the things
            assert differ[corner].all()
            continue
        _, index = what_changed(before, after)
        assert not differ[boxes[index] > 1 / size].any()


@pytest.mark.parametrize("what", CHANGES)
def test_training_shows_no_held_out_combination_and_scoring_always_a_new_one(what):
    for before, after in pairs_of(what):
        assert not (combinations(before) | combinations(after)) & HELD_OUT
    for before, after in pairs_of(what, held_out=True):
        assert not combinations(before) & HELD_OUT
        assert combinations(after) & HELD_OUT


def test_every_wording_colour_and_shape_is_used():
    said = {re.sub("the .*?(?= into| with| to|$)", "IT", PAIRS.instruction(n, 0)) for n in range(400)}
    assert {words.split()[0] for words in said} == {words.split()[0] for words in (*TO_COLOUR, *TO_SHAPE)}
    ends = {PAIRS.instruction(number, 0).split()[-1] for number in range(400)}
    assert ends == {*COLOURS, *SHAPES}


def test_both_pictures_of_a_pair_are_the_result_of_editing_the_other():
    assert {what_changed(PAIRS.scene(2 * n), PAIRS.scene(2 * n + 1))[0] for n in range(20)} == set(CHANGES)
    for number in range(20):
        words = PAIRS.instruction(number, 0)
        scene, other = PAIRS.scene(number), PAIRS.scene(number ^ 1)
        what, index = what_changed(other, scene)
        new = scene.background.colour if what == "background" else getattr(scene.things[index], what)
        assert words.endswith(new)
        assert words == PAIRS.instruction(number, 0)
    assert len({PAIRS.instruction(0, time) for time in range(20)}) > 2  # worded anew


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    path, vae = tmp_path_factory.mktemp("pairs") / "latents.safetensors", fill(TINY)["vae"]
    encode_all(vae, PAIRS, 8, path, batch_size=4, on_batch=lambda count: None, made_of=PAIRS.name)
    return EncodedPairs(path, PAIRS, seed=0), vae


def test_training_shows_what_editing_shows(encoded):
    """The other picture's latents as `sd edit` gives them to the network: the posterior's mean, not scaled."""
    pairs, vae = encoded
    images = torch.cat([PAIRS.batch(step, 4)[0] for step in range(2)])
    with torch.no_grad():
        means = vae.encode(images)[0]
        for number in range(8):
            init = InitImage(image=images[number ^ 1][None])
            conditions = conditions_for(
                CONFIG, init, lambda image: TINY.vae.latent_scale * vae.encode(image)[0], edits=True
            )
            seen = with_picture(lambda x, *_: x, conditions.edited, 1)(torch.zeros(1, 4, 8, 8), None, None)
            assert torch.allclose(pairs.moments["beside"][number], seen[0, 4:], atol=1e-4)
            assert torch.allclose(pairs.moments["mean"][number], means[number], atol=1e-4)


def test_left_out_instructions_and_pictures_reach_the_network_as_nothing(encoded):
    pairs, _ = encoded
    no_words, no_picture = zip(*(left_out(0, step, 8) for step in range(40)), strict=True)
    assert torch.stack(no_words).any()
    assert torch.stack(no_picture).any()
    for step in range(40):
        batch = pairs.batch(step, 8, slice(None))
        assert [words == "" for words in batch.captions] == no_words[step].tolist()
        assert (~batch.beside.flatten(1).any(dim=1)).tolist() == no_picture[step].tolist()
        part = pairs.batch(step, 8, slice(4, 8))  # one of two processes
        assert part.captions == batch.captions[4:]
        assert torch.equal(part.beside, batch.beside[4:])


def test_a_twentieth_each_lacks_the_instruction_the_picture_or_both():
    no_words, no_picture = (
        torch.cat(rows) for rows in zip(*(left_out(1, step, 32) for step in range(1000)), strict=True)
    )
    for rows in (no_words & ~no_picture, no_picture & ~no_words, no_words & no_picture):
        assert rows.float().mean().item() == pytest.approx(0.05, abs=0.005)  # four standard deviations


def test_the_network_begins_as_the_old_one_whatever_the_picture():
    unet = fill(TINY)["unet"]
    wider = widened(unet, CONFIG)
    assert (CONFIG.family, CONFIG.unet.in_channels) == ("sd-v1-edit", 8)
    x_t, beside, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 77, TINY.unet.context_width)
    with torch.no_grad():
        old = unet(x_t, torch.tensor(500), context)
        new = wider(torch.cat([x_t, beside / TINY.vae.latent_scale], 1), torch.tensor(500), context)
    assert (old - new).norm() / old.norm() < 1e-6


def drawn(what, held_out=True):
    before, after = sample_pair(Random(f"judged {what}"), what, held_out=held_out)
    edit = edit_of(before, after, what, 128, Random(0), seed=0)
    return edit, to_images(render([after], 128))[0]


@pytest.mark.parametrize("what", CHANGES)
def test_a_followed_instruction_is_told_from_an_ignored_one_and_from_another_change(what):
    edit, result = drawn(what)
    others = [drawn(other)[1] for other in CHANGES if other != what]
    done, ignored, *wrong = judge([result, edit.picture, *others], [edit] * 4)
    assert done.followed
    assert done.kept
    assert done.psnr == np.inf
    assert not ignored.followed
    assert ignored.kept
    assert not any(verdict.followed and verdict.kept for verdict in wrong)


@pytest.mark.parametrize(("levels", "kept"), [(10, True), (20, False)])
def test_the_rest_is_measured_away_from_the_change(levels, kept):
    """A rest that is off by 10 of 255 levels has 28.1 dB, one that is off by 20 has 22.1; the change does not count."""
    edit, result = drawn("colour")
    pixels = np.asarray(result).astype(int)
    shifted = np.where(pixels < 128, pixels + levels, pixels - levels).astype(np.uint8)
    (verdict,) = judge([Image.fromarray(shifted)], [edit])
    assert verdict.psnr == pytest.approx(20 * np.log10(255 / levels), abs=1e-6)
    assert verdict.kept is kept
    spoiled = np.where(edit.rest[..., None], pixels, 0).astype(np.uint8)
    assert judge([Image.fromarray(spoiled)], [edit])[0].psnr == np.inf


def test_instructions_for_scoring_are_of_each_kind_in_turn_and_do_not_depend_on_the_number():
    edits = new_edits(9, 64)
    assert [edit.what for edit in edits] == list(CHANGES) * 3
    assert [edit.instruction for edit in new_edits(3, 64)] == [edit.instruction for edit in edits[:3]]
    assert [edit.instruction for edit in new_edits(9, 64, seed=1)] != [edit.instruction for edit in edits]
    assert {len(edit.result.wanted.things) for edit in edits} == {1, 2}
    assert {len(edit.result.wanted.things) for edit in new_edits(9, 64, kinds=("single",))} == {1}
