"""From an ordinary model to one that sees what it must not change: five more channels, and pictures with holes.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 4.5. That a network for
inpainting begins as an ordinary one, with zeros for the weights of the new channels, is how the published checkpoints
were made: runwayml/stable-diffusion-inpainting, model card.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.config import SD_V1_INPAINTING, ModelConfig
from sd.networks.unet import UNet
from sd.networks.vae import VAE
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scenes import Thing

EVERYTHING = 0.25  # share of holes that are the whole picture, as for the published checkpoints
AROUND = 0.45  # share of holes around one thing: what fills them has to fit into them
LEAST_REACH, MOST_REACH = 1.0, 1.7  # of those to each side, from the thing's centre, in its radii
LEAST, MOST = 0.3, 0.9  # sides of the others, in those of the picture


def inpainting_config(config: ModelConfig) -> ModelConfig:
    """The same model with channels for the mask and the latents of what is kept."""
    channels = config.unet.in_channels + 1 + config.vae.latent_channels
    return replace(config, family=SD_V1_INPAINTING.family, unet=replace(config.unet, in_channels=channels))


@torch.no_grad()
def widened(unet: UNet, config: ModelConfig) -> UNet:
    """A UNet with more input channels that predicts what the given one does, whatever is in the new ones.

    config  what `inpainting_config` makes of the given network's
    """
    wider = UNet(config.unet)
    state = unet.state_dict()
    name = "input_blocks.0.conv.weight"
    more = config.unet.in_channels - state[name].shape[1]
    state[name] = F.pad(state[name], (0, 0, 0, 0, 0, more))
    wider.load_state_dict(state)
    return wider.to(unet.out.conv.weight.device)


def hole(seed: int, number: int, size: int, things: Sequence[Thing]) -> Tensor:
    """What of picture `number` is to be made anew, 1, and what is kept, 0: (1, size, size).

    Everything, a rectangle around one of the things, or a rectangle or an ellipse somewhere. Only holes of the second
    kind show that a thing has to end where its hole does: through the others, things go on beyond the edge.
    """
    generator = Random(f"hole {seed} {number}")
    kind = generator.random()
    if kind < EVERYTHING:
        return torch.ones(1, size, size)
    if kind < EVERYTHING + AROUND:
        thing = generator.choice(things)
        reach = [thing.radius * generator.uniform(LEAST_REACH, MOST_REACH) for _ in range(4)]
        left, top, width, height = thing.x - reach[0], thing.y - reach[1], reach[0] + reach[2], reach[1] + reach[3]
        ellipse = False
    else:
        width, height = (generator.uniform(LEAST, MOST) for _ in "wh")
        left, top = (generator.uniform(0, 1 - side) for side in (width, height))
        ellipse = generator.random() < 0.5
    grid = (torch.arange(size) + 0.5) / size
    x, y = (2 * (grid - left) / width - 1).abs(), (2 * (grid[:, None] - top) / height - 1).abs()  # 1 at the edges
    within = torch.hypot(x, y) if ellipse else torch.maximum(x, y)
    return (within <= 1).float()[None]


def show_holes(vae: VAE, scale: float, pictures: ShapesDataset) -> Callable[[int, Tensor], Tensor]:
    """What the network sees of pictures with holes: the mask, and the scaled latents of what is kept.

    returns  (number of the first, pictures (b, 3, H, H)) -> (b, 1 + 4, H/8, H/8), as `sd.sampling.init_image.shown` has
             it
    """

    def mask(number: int) -> Tensor:
        scene, _ = pictures.describe(number)
        return hole(pictures.seed, number, pictures.size, scene.things)

    def show(first: int, images: Tensor) -> Tensor:
        masks = torch.stack([mask(first + i) for i in range(len(images))]).to(images.device)
        kept = scale * vae.encode(images * (1 - masks))[0]
        return torch.cat([F.max_pool2d(masks, pictures.size // kept.shape[-1]), kept], dim=1)

    return show
