"""Training a network for inpainting: how it begins, the holes, and its extra input channels."""

import numpy as np
import pytest
import torch
from conftest import TINY, fill
from PIL import Image
from torch import nn

from sd.pipeline.image.masks import latent_mask
from sd.sampling.init_image import with_channels
from sd.sampling.schedule import alphas_cumprod
from sd.training.inpainting import (
    AROUND,
    EVERYTHING,
    LEAST,
    LEAST_REACH,
    MOST,
    MOST_REACH,
    hole,
    inpainting_config,
    show_holes,
    widened,
)
from sd.training.latents import EncodedOnce, encode_all
from sd.training.losses import DenoisingLoss
from sd.training.shapes.drawing import ShapesDataset

CONFIG = inpainting_config(TINY)


class FirstChannels(nn.Module):
    """Returns the first four channels of its input, and keeps all of it."""

    def forward(self, x, *_):
        self.seen = x
        return x[:, :4]


def test_a_widened_network_predicts_the_same_whatever_the_new_channels_hold():
    unet = fill(TINY)["unet"]
    wider = widened(unet, CONFIG)
    assert wider.input_blocks[0].conv.weight.shape[1] == CONFIG.unet.in_channels == 9
    assert CONFIG.family == "sd-v1-inpainting"
    x_t, beside, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.randn(2, 77, TINY.unet.context_width)
    with torch.no_grad():
        narrow = unet(x_t, torch.tensor(500), context)
        wide = wider(torch.cat([x_t, beside], 1), torch.tensor(500), context)
    assert (narrow - wide).norm() / narrow.norm() < 1e-6


SCENES = ShapesDataset(0, 64)


def holes(count):
    """The things of each scene, and its hole; holes that cover everything are left out."""
    things = [SCENES.describe(number)[0].things for number in range(count)]
    found = [(each, hole(0, number, 64, each)[0]) for number, each in enumerate(things)]
    assert sum(bool(one.all()) for _, one in found) / count == pytest.approx(EVERYTHING, abs=0.07)
    return [(each, one) for each, one in found if not one.all()]


def box(one):
    """left, top, right, bottom of a hole, as shares of the picture"""
    rows, columns = one.any(dim=1).nonzero(), one.any(dim=0).nonzero()
    return [int(place) / 64 for place in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


def is_around(thing, sides):
    """Whether a hole reaches around all of a thing, with as much room as it should have; a pixel is 1/64."""
    left, top, right, bottom = sides
    reaches = thing.x - left, thing.y - top, right - thing.x, bottom - thing.y
    at_edge = left == 0, top == 0, right == 1, bottom == 1
    least, most = (limit * thing.radius for limit in (LEAST_REACH, MOST_REACH))
    return all(least - 1 / 64 <= reach <= most + 1 / 64 or edge for reach, edge in zip(reaches, at_edge, strict=True))


def test_many_holes_are_around_one_thing_and_the_others_rectangles_and_ellipses_anywhere():
    found = [(any(is_around(thing, box(one)) for thing in things), box(one), one) for things, one in holes(400)]
    around = sum(each for each, _, _ in found)
    assert AROUND - 0.06 <= around / 400 <= AROUND + 0.12  # some of the others are so by chance
    ellipses = []
    for is_one, (left, top, right, bottom), one in found:
        assert set(one.unique().tolist()) == {0.0, 1.0}
        if is_one:
            continue
        assert all(LEAST - 3 / 64 <= side <= MOST + 1 / 64 for side in (right - left, bottom - top))
        share = one.mean() / ((right - left) * (bottom - top))
        assert share == pytest.approx(1) or share == pytest.approx(torch.pi / 4, abs=0.05)
        ellipses.append(bool(share < 0.9))
    assert 0.35 < sum(ellipses) / len(ellipses) < 0.65


def test_a_picture_always_has_the_same_hole():
    things = SCENES.describe(5)[0].things
    assert torch.equal(hole(0, 5, 64, things), hole(0, 5, 64, things))
    assert not torch.equal(hole(0, 5, 64, things), hole(1, 5, 64, things))


def test_training_shows_what_inpainting_shows():
    """The mask of every latent that holds a repainted pixel, and the latents of the picture painted grey there."""
    vae = fill(TINY)["vae"]
    images, _ = SCENES.batch(2, 4)
    scale = TINY.vae.latent_scale
    with torch.no_grad():
        beside = show_holes(vae, scale, SCENES)(8, images)
    for i in range(4):
        mask = hole(SCENES.seed, 8 + i, 64, SCENES.describe(8 + i)[0].things)
        cells = latent_mask(Image.fromarray((255 * mask[0]).numpy().astype(np.uint8)))
        assert np.array_equal(beside[i, 0].numpy(), cells)
        with torch.no_grad():
            kept = scale * vae.encode(torch.where(mask > 0, torch.zeros(()), images[i])[None])[0]
        channels = torch.cat([torch.tensor(cells)[None, None], kept], dim=1)
        seen = with_channels(lambda x, *_: x, channels)(torch.zeros(1, 4, 8, 8), None, None)
        assert torch.allclose(beside[i], seen[0, 4:], atol=1e-5)


def test_mask_and_masked_latents_follow_the_noisy_latents_in_the_networks_input(tmp_path):
    vae, path = fill(TINY)["vae"], tmp_path / "latents.safetensors"
    look = show_holes(vae, 1.0, SCENES)
    with torch.no_grad():
        encode_all(vae, SCENES, 4, path, batch_size=2, on_batch=lambda count: None, look_beside=look)
    encoded = EncodedOnce(path, lambda number, time: str(number), seed=0).batch(0, 4, slice(None))
    images = torch.cat([SCENES.batch(0, 4)[0][int(number)][None] for number in encoded.captions])
    for i, number in enumerate(map(int, encoded.captions)):
        with torch.no_grad():
            assert torch.allclose(encoded.beside[i], look(number, images[i : i + 1])[0], atol=1e-5)
    network = FirstChannels()
    loss = DenoisingLoss(network, nn.Identity(), alphas_cumprod(TINY.schedule))
    latents, timesteps = torch.randn(4, 4, 8, 8), torch.tensor([0, 300, 600, 999])
    loss(latents, torch.zeros(4, 77), timesteps, torch.randn(4, 4, 8, 8), encoded.beside)
    assert torch.equal(network.seen[:, 4:], encoded.beside)
