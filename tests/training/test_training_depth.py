"""Training a network for depth to image: its depth maps, its further channel, and what its score measures."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assemble, fill
from PIL import Image
from torch import nn

from sd.pipeline.image.tensors import to_images
from sd.sampling.schedule import alphas_cumprod
from sd.training.depth import (
    APART,
    LARGEST_SLOPE,
    SOFTEST,
    ScenesWithDepth,
    depth_config,
    depth_map,
    map_of,
    planes,
    show_depth,
)
from sd.training.losses import DenoisingLoss
from sd.training.shapes.captions import SIZE_WORDS
from sd.training.shapes.drawing import ShapesDataset, render
from sd.training.shapes.recolouring import overlap, recoloured, recolourings, regions
from sd.training.shapes.scenes import COLOURS, HELD_OUT
from sd.training.widening import widened

CONFIG = depth_config(TINY)
SCENES = ShapesDataset(0, 64)
KINDS = {"alone": 1, "side by side": 2, "inside": 2}  # of scenes: how many things
SIZE = 256


def scene_of(kind):
    """One whose things are wide enough to have pixels far from every edge."""
    relations = {"alone": [None], "side by side": ["left of", "right of", "above", "below"], "inside": ["inside"]}[kind]
    scenes = (SCENES.describe(number)[0] for number in range(1000))
    return next(one for one in scenes if one.relation in relations and all(map(torch.any, cores(one))))


def cores(scene):
    """The pixels of each thing, and of the background, that are far from every edge."""
    things = regions(scene, SIZE)
    reach = 2 * round(SIZE * SOFTEST / 2) + 1
    parts = torch.stack([*things, ~torch.stack(things).any(dim=0)]).float()
    return list(-F.max_pool2d(-parts, reach, 1, reach // 2) > 0)


def test_a_widened_network_predicts_the_same_whatever_the_map():
    unet = fill(TINY)["unet"]
    wider = widened(unet, CONFIG)
    assert (CONFIG.family, CONFIG.unet.in_channels, CONFIG.depth) == ("sd-v1-depth", 5, None)
    x_t, depth, context = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 77, TINY.unet.context_width)
    with torch.no_grad():
        narrow = unet(x_t, torch.tensor(500), context)
        wide = wider(torch.cat([x_t, depth], 1), torch.tensor(500), context)
    assert (narrow - wide).norm() / narrow.norm() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_of_a_thing_have_its_depth_and_the_nearest_covers(kind):
    scene = scene_of(kind)
    assert len(scene.things) == KINDS[kind]
    for seed in range(5):
        depth = depth_map(scene, SIZE, Random(seed))
        in_front, behind = planes(scene, Random(seed))
        for core, plane in zip(cores(scene), [*in_front, behind], strict=True):
            assert (depth[core] - plane.depth).abs().max() <= LARGEST_SLOPE
        assert min(plane.depth for plane in in_front) > behind.depth + LARGEST_SLOPE
        if kind == "inside":
            assert in_front[0].depth >= in_front[1].depth + APART


def test_side_by_side_either_thing_is_the_nearer_one():
    scene = scene_of("side by side")
    order = [first.depth > second.depth for (first, second), _ in (planes(scene, Random(seed)) for seed in range(40))]
    assert 10 < sum(order) < 30


def test_maps_are_tilted_their_edges_soft_and_always_the_same():
    maps = [map_of(SCENES, number) for number in range(8)]
    assert all(torch.equal(one, map_of(SCENES, number)) for number, one in enumerate(maps))
    assert not torch.equal(maps[3], map_of(ShapesDataset(1, 64), 3))
    slopes = [one.diff(dim=1).abs().median().item() for one in maps]
    assert all(0 < slope <= LARGEST_SLOPE / 64 + 1e-6 for slope in slopes)


def test_training_shows_what_depth_to_image_shows():
    """The channel that training makes of a picture's map is the one that the UNet reads if a user gives that map."""
    images, _ = SCENES.batch(2, 4)
    beside = show_depth(8, SCENES)(8, images)
    assert beside.shape == (4, 1, 8, 8)
    assert (beside.amin((1, 2, 3)) == -1).all()
    model = assemble(CONFIG, fill(CONFIG))
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 4:]))
    for i in range(4):
        given = map_of(SCENES, 8 + i).numpy()
        options = {"seed": 1, "steps": 1, "strength": 1, "guidance_scale": 1, "size": (64, 64)}
        model.depth2img("a circle", Image.new("RGB", (64, 64)), given, **options)
        assert torch.allclose(seen[-1], beside[i : i + 1], atol=5e-3)  # given maps are first scaled to 0 to 65535
    hook.remove()


def test_the_first_step_already_moves_the_new_weights():
    unet = widened(fill(TINY)["unet"], CONFIG).requires_grad_(True)
    images, _ = SCENES.batch(0, 1)
    context = torch.randn(1, 77, TINY.unet.context_width)
    with torch.enable_grad():
        loss = DenoisingLoss(unet, nn.Identity(), alphas_cumprod(TINY.schedule))
        loss(
            torch.randn(1, 4, 8, 8),
            context,
            torch.tensor([900]),
            torch.randn(1, 4, 8, 8),
            show_depth(8, SCENES)(0, images),
        ).backward()
    assert unet.input_blocks[0].conv.weight.grad[:, 4].abs().max() > 0


def test_captions_leave_sizes_to_the_map():
    words = {word for group in SIZE_WORDS.values() for word in group}
    pictures, usual = ScenesWithDepth(0, 64), ShapesDataset(0, 64)
    assert pictures.name == usual.name
    for number in range(40):
        said = pictures.recaption(number, number % 3)
        assert not words & set(said.split())
        assert all(f"{thing.colour} {thing.shape}" in said for thing in pictures.describe(number)[0].things)
    assert any(words & set(usual.recaption(number, 0).split()) for number in range(40))


@pytest.fixture(scope="module")
def asked():
    return recolourings(16, 128)


def test_scenes_to_score_and_their_prompts_were_not_in_training(asked):
    assert {len(each.asked.things) for each in asked} == {1, 2}
    for each in asked:
        behind = each.asked.background.colour
        colours = [behind, *(thing.colour for thing in each.asked.things)]
        assert len(set(colours)) == len(colours)
        assert {(thing.shape, thing.colour, behind) for thing in each.asked.things} <= HELD_OUT
        assert all(f"{thing.colour} {thing.shape}" in each.prompt for thing in each.asked.things)
        assert f"{behind} background" in each.prompt


def test_drawings_of_what_was_asked_score_high_and_all_others_low(asked):
    drawings = to_images(render([each.asked for each in asked], 128))
    right = [overlap(drawing, each.asked) for drawing, each in zip(drawings, asked, strict=True)]
    assert min(right) > 0.85
    assert np.mean(right) > 0.95
    assert all(overlap(each.picture, each.asked) == 0 for each in asked)
    assert overlap(Image.new("RGB", (128, 128), "red"), asked[0].asked) == 0


def moved(thing):
    return replace(thing, x=thing.x + thing.radius * (1 if thing.x < 0.5 else -1))


def shrunk(thing):
    return replace(thing, radius=0.75 * thing.radius)


@pytest.mark.parametrize("change", [moved, shrunk])
def test_the_right_colours_in_other_regions_score_low(change, asked):
    for each in asked:
        wrong = replace(each.asked, things=tuple(map(change, each.asked.things)))
        (drawing,) = to_images(render([wrong], 128))
        assert overlap(drawing, each.asked) < 0.8


def test_the_lower_of_two_things_counts(asked):
    each = next(each for each in asked if each.asked.relation == "left of")
    first, second = each.asked.things
    behind = each.asked.background.colour
    other = next(colour for colour in COLOURS if colour not in (first.colour, second.colour, behind))
    (drawing,) = to_images(render([recoloured(each.asked, behind, [first.colour, other])], 128))
    assert overlap(drawing, each.asked) == 0
