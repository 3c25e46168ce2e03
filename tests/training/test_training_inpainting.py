"""Training a network for inpainting: how it begins, the holes, and its extra input channels."""

import numpy as np
import pytest
import torch
from conftest import TINY, fill
from PIL import Image
from torch import nn

from sd.config import FAMILIES, SD_V1, SD_V2, SDXL
from sd.pipeline.image.masks import latent_mask
from sd.sampling.init_image import with_channels
from sd.sampling.schedule import alphas_cumprod
from sd.training.depth import depth_config
from sd.training.editing import editing_config
from sd.training.inpainting import EVERYTHING, hole, inpainting_config, show_holes
from sd.training.latents import EncodedOnce, encode_all
from sd.training.losses import DenoisingLoss
from sd.training.shapes.drawing import ShapesDataset
from sd.training.widening import widened

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


@pytest.mark.parametrize(
    ("make", "task", "channels"),
    [(inpainting_config, "inpainting", 9), (editing_config, "edit", 8), (depth_config, "depth", 5)],
    ids=["inpainting", "edit", "depth"],
)
@pytest.mark.parametrize("family", [SD_V1, SD_V2, SDXL], ids=lambda each: each.family)
def test_the_family_of_a_wider_model_is_that_of_its_task_or_there_is_none(make, task, channels, family):
    name = f"{family.family}-{task}"
    if name not in FAMILIES:
        with pytest.raises(ValueError, match=f"there is no family '{name}'; there are"):
            make(family)
        return
    wider = make(family)
    assert (wider.family, wider.unet.in_channels) == (name, channels)
    assert make(wider) == wider  # trained further
    other = depth_config if task == "edit" else editing_config
    with pytest.raises(ValueError, match=f"there is no family '{name}-"):
        other(wider)


SCENES = ShapesDataset(0, 64)


def test_holes_cover_everything_a_thing_or_a_rectangle_or_ellipse_anywhere():
    """The areas were recorded when the bounds of each kind had been checked hole by hole."""
    holes = torch.stack([hole(0, number, 64, SCENES.describe(number)[0].things)[0] for number in range(400)])
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    areas = holes.mean(dim=(1, 2))
    assert (areas == 1).float().mean().item() == pytest.approx(EVERYTHING, abs=0.07)
    assert [areas.mean().item(), areas.std().item()] == pytest.approx([0.5034, 0.3447], abs=1e-3)
    middles = (holes * (torch.arange(64) - 31.5)).mean(dim=(1, 2))
    assert middles.std().item() == pytest.approx(2.2211, abs=1e-3)


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
