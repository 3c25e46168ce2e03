"""Turn an ordinary model into an inpainting model: five more input channels, trained on pictures with holes.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 4.5. As for the published
checkpoints, training begins with an ordinary network and zero weights for the new channels:
runwayml/stable-diffusion-inpainting, model card.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.config import ModelConfig
from sd.networks.vae import VAE
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scenes import Thing
from sd.training.widening import wider_config

EVERYTHING = 0.25  # share of holes that cover the whole picture, as for the published checkpoints
AROUND = 0.45  # share of holes around one thing: the new thing has to fit into them
LEAST_REACH, MOST_REACH = 1.0, 1.7  # of those holes, from the thing's centre to each side, in its radii
LEAST, MOST = 0.3, 0.9  # sides of all other holes, as shares of the picture's side


def inpainting_config(config: ModelConfig) -> ModelConfig:
    """The same model with channels for the mask and the latents of the masked picture."""
    return wider_config(config, "inpainting", 1 + config.vae.latent_channels)


def hole(seed: int, number: int, size: int, things: Sequence[Thing]) -> Tensor:
    """The mask of picture `number`: 1 is repainted, 0 is kept. Returns (1, size, size).

    Either everything, or a rectangle around one of the things, or a rectangle or an ellipse anywhere. Only the second
    kind teaches that a thing must end inside its hole: at the edges of the others, things continue outside.
    """
    generator = Random(f"hole {seed} {number}")
    kind = generator.random()
    if kind < EVERYTHING:
        return torch.ones(1, size, size, dtype=torch.float32, device="cpu")
    if kind < EVERYTHING + AROUND:
        thing = generator.choice(things)
        reach = [thing.radius * generator.uniform(LEAST_REACH, MOST_REACH) for _ in range(4)]
        left, top, width, height = thing.x - reach[0], thing.y - reach[1], reach[0] + reach[2], reach[1] + reach[3]
        ellipse = False
    else:
        width, height = (generator.uniform(LEAST, MOST) for _ in "wh")
        left, top = (generator.uniform(0, 1 - side) for side in (width, height))
        ellipse = generator.random() < 0.5
    grid = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5) / size
    x, y = (2 * (grid - left) / width - 1).abs(), (2 * (grid[:, None] - top) / height - 1).abs()  # 1 at the edges
    within = torch.hypot(x, y) if ellipse else torch.maximum(x, y)
    return (within <= 1).float()[None]


def show_holes(vae: VAE, scale: float, pictures: ShapesDataset) -> Callable[[int, Tensor], Tensor]:
    """The extra input channels for pictures with holes: the mask, and the scaled latents of the masked picture.

    returns  (number of the first, pictures (b, 3, H, H)) -> (b, 1 + 4, H/8, H/8), in the order used for sampling
    """

    def mask(number: int) -> Tensor:
        scene, _ = pictures.describe(number)
        return hole(pictures.seed, number, pictures.size, scene.things)

    def show(first: int, images: Tensor) -> Tensor:
        masks = torch.stack([mask(first + i) for i in range(len(images))]).to(images.device)
        kept = scale * vae.encode(images * (1 - masks))[0]
        return torch.cat([F.max_pool2d(masks, pictures.size // kept.shape[-1]), kept], dim=1)

    return show
