"""Turn an ordinary model into one that edits by instruction: four more input channels, trained on pairs of pictures.

Brooks, Holynski & Efros, "InstructPix2Pix: Learning to Follow Image Editing Instructions" (2023), section 3.2: the UNet
learns to make the picture after the edit from noise, and reads the picture before it.
"""

from pathlib import Path

import torch
from torch import Tensor

from sd.config import ModelConfig
from sd.training.latents import Encoded, EncodedOnce
from sd.training.shapes.edits import PicturePairs
from sd.training.widening import wider_config

DROPPED = 0.05  # share of rows without the instruction, of rows without the picture, and of rows without both


def editing_config(config: ModelConfig) -> ModelConfig:
    """The same model with channels for the latents of the picture to edit."""
    return wider_config(config, "edit", config.vae.latent_channels)


def left_out(seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Which rows of a batch are trained without the instruction, and which without the picture: (count,) bool each.

    A twentieth lacks the first, another the second, a third one both (section 3.2.1), so that the network can be asked
    what `sd.sampling.denoiser.guide_edit` combines.
    """
    generator = torch.Generator("cpu").manual_seed(seed * 2**31 + step + 2**30)  # other numbers than `losses.draw`
    place = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
    return (place < 2 * DROPPED), (place >= DROPPED) & (place < 3 * DROPPED)


class EncodedPairs(EncodedOnce):
    """Encoded pairs of pictures: each is shown as the result of editing the other, whose latents stand beside.

    path  the moments of `PicturePairs`, from `encode_all`
    """

    def __init__(self, path: Path, pairs: PicturePairs, seed: int):
        super().__init__(path, pairs.instruction, seed, pairs.name)
        mean = self.moments["mean"]
        self.moments["beside"] = mean.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # the other one's, not scaled

    def batch(self, step: int, batch_size: int, share: slice) -> Encoded:
        encoded = super().batch(step, batch_size, share)
        no_words, no_picture = (rows[share] for rows in left_out(self.seed, step, batch_size))
        captions = ["" if drop else words for words, drop in zip(encoded.captions, no_words.tolist(), strict=True)]
        beside = encoded.beside.masked_fill(no_picture[:, None, None, None], 0)
        return encoded._replace(captions=captions, beside=beside)
