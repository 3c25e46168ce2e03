"""Training a network for inpainting: how it begins, the holes, and what it is shown."""

import numpy as np
import pytest
import torch
from conftest import TINY, fill
from PIL import Image
from torch import nn

from sd.from_picture import shown
from sd.pictures.masks import latent_mask
from sd.schedule import alphas_cumprod
from sd.training.inpainting import EVERYTHING, LEAST, MOST, hole, inpainting_config, show_holes, widened
from sd.training.latents import EncodedOnce, encode_all
from sd.training.losses import DenoisingLoss
from sd.training.shapes import ShapesDataset

CONFIG = inpainting_config(TINY)


class FirstChannels(nn.Module):
    """Gives back some of what it was given, and keeps all of it."""

    def forward(self, x, *_):
        self.seen = x
        return x[:, :4]


def test_a_widened_network_predicts_the_same_whatever_it_is_shown_beside():
    unet = fill(TINY)["unet"]
    wider = widened(unet, CONFIG)
    assert wider.input_blocks[0].conv.weight.shape[1] == CONFIG.unet.in_channels == 9
    assert CONFIG.family == "sd-v1-inpainting"
    x_t, beside, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.randn(2, 77, TINY.unet.context_width)
    with torch.no_grad():
        narrow, wide = (
            unet(x_t, torch.tensor(500), context),
            wider(torch.cat([x_t, beside], 1), torch.tensor(500), context),
        )
    assert (narrow - wide).norm() / narrow.norm() < 1e-6


def test_holes_are_rectangles_ellipses_or_everything():
    holes = [hole(0, number, 64)[0] for number in range(400)]
    whole = [bool(one.all()) for one in holes]
    assert sum(whole) / 400 == pytest.approx(EVERYTHING, abs=0.07)
    full = 0
    for one in (one for one, all_of_it in zip(holes, whole, strict=True) if not all_of_it):
        assert set(one.unique().tolist()) == {0.0, 1.0}
        rows, columns = one.any(dim=1).nonzero(), one.any(dim=0).nonzero()
        sides = [len(rows), len(columns)]
        assert all(64 * LEAST - 3 <= side <= 64 * MOST + 1 for side in sides)
        share = one.sum() / (sides[0] * sides[1])
        assert share == 1 or share == pytest.approx(torch.pi / 4, abs=0.05)
        full += share == 1
    assert 100 < full < 200
    assert torch.equal(hole(0, 5, 64), hole(0, 5, 64))
    assert not torch.equal(hole(0, 5, 64), hole(1, 5, 64))


def test_training_shows_what_inpainting_shows():
    """The mask of every latent that a repainted pixel lies in, and the latents of the picture painted grey there."""
    vae = fill(TINY)["vae"]
    images, _ = ShapesDataset(0, 64).batch(0, 4)
    scale = TINY.vae.latent_scale
    with torch.no_grad():
        beside = show_holes(vae, scale, 7)(8, images)
    for i in range(4):
        mask = hole(7, 8 + i, 64)
        cells = latent_mask(Image.fromarray((255 * mask[0]).numpy().astype(np.uint8)))
        assert np.array_equal(beside[i, 0].numpy(), cells)
        with torch.no_grad():
            kept = scale * vae.encode(torch.where(mask > 0, torch.zeros(()), images[i])[None])[0]
        seen = shown(lambda x, *_: x, torch.tensor(cells)[None, None], kept)(torch.zeros(1, 4, 8, 8), None, None)
        assert torch.allclose(beside[i], seen[0, 4:], atol=1e-5)


def test_what_is_shown_beside_reaches_the_network_behind_the_noisy_latents(tmp_path):
    vae, path = fill(TINY)["vae"], tmp_path / "latents.safetensors"
    look = show_holes(vae, 1.0, 0)
    with torch.no_grad():
        encode_all(vae, ShapesDataset(0, 64), 4, path, batch_size=2, on_batch=lambda count: None, look_beside=look)
    encoded = EncodedOnce(path, lambda number, time: str(number), seed=0).batch(0, 4, slice(None))
    images = torch.cat([ShapesDataset(0, 64).batch(0, 4)[0][int(number)][None] for number in encoded.captions])
    for i, number in enumerate(map(int, encoded.captions)):
        with torch.no_grad():
            assert torch.allclose(encoded.beside[i], look(number, images[i : i + 1])[0], atol=1e-5)
    network = FirstChannels()
    loss = DenoisingLoss(network, nn.Identity(), alphas_cumprod(TINY.schedule))
    latents, timesteps = torch.randn(4, 4, 8, 8), torch.tensor([0, 300, 600, 999])
    loss(latents, torch.zeros(4, 77), timesteps, torch.randn(4, 4, 8, 8), encoded.beside)
    assert torch.equal(network.seen[:, 4:], encoded.beside)
