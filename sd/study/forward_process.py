"""What training does to a picture: the VAE encodes it, then noise is added to the latents.

The network learns the way back. Rombach et al. (2022), section 3.1; Ho et al. (2020), eq. 4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd.pipeline.image.tensors import to_tensor
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.noise import PictureNoise
from sd.sampling.schedule import add_noise, alphas_cumprod

TIMESTEPS = (0, 100, 250, 500, 750, 999)


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """x_t at one timestep."""

    timestep: int | None  # None: x_0, before any noise
    alpha_bar: float  # share of the signal's power
    latents: Tensor  # (1, 4, H, W) float32
    picture: Image.Image  # decoded

    @property
    def signal_to_noise(self) -> float:
        """alpha_bar / (1 - alpha_bar), for latents of unit variance: Kingma et al., "Variational
        Diffusion Models" (2021), eq. 2."""
        return self.alpha_bar / (1 - self.alpha_bar) if self.alpha_bar < 1 else math.inf


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """A picture, its latents, and the picture decoded from them."""

    picture: Image.Image
    latents: Tensor  # (1, 4, H, W) float32, scaled
    reconstruction: Image.Image

    @property
    def psnr(self) -> float:
        """The reconstruction's, in decibels; infinite if it equals the picture."""
        return psnr(self.picture, self.reconstruction)

    @property
    def numbers(self) -> tuple[int, int]:
        """How many numbers the picture has, three per pixel, and how many its latents."""
        return self.picture.width * self.picture.height * 3, self.latents.numel()

    @property
    def positions(self) -> tuple[int, int]:
        """How many positions the picture has, and how many its latents."""
        return self.picture.width * self.picture.height, self.latents.shape[-1] * self.latents.shape[-2]


def psnr(picture: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of 8 bits a channel: 10 log10(255^2 / mean squared error)."""
    error = (np.asarray(picture, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2
    return 10 * math.log10(255**2 / error.mean()) if error.any() else math.inf


def round_trip(model: StableDiffusion, picture: Image.Image) -> RoundTrip:
    """Encode and decode a picture (RGB, sides are multiples of 8). Raises NonFiniteError if the VAE fails."""
    latents = model.encode_image(to_tensor(picture))
    (reconstruction,) = model.decode(latents)
    return RoundTrip(picture=picture, latents=latents.cpu(), reconstruction=reconstruction)


def forward_process(
    model: StableDiffusion, x_0: Tensor, timesteps: Sequence[int] = TIMESTEPS, *, seed: int = 0
) -> list[NoiseLevel]:
    """x_0, then x_t at each timestep, all with the same noise.

    x_0  (1, 4, H, W) scaled latents

    Raises ValueError for a timestep that the model does not have.
    """
    table = alphas_cumprod(model.config.schedule)
    for timestep in timesteps:
        if not 0 <= timestep < len(table):
            raise ValueError(f"timesteps are 0 to {len(table) - 1}, got {timestep}")
    noise = PictureNoise([seed], x_0.shape[1:])()
    found = []
    for timestep in (None, *timesteps):
        alpha_bar = torch.ones((), dtype=torch.float32, device="cpu") if timestep is None else table[timestep]
        x_t = add_noise(x_0, noise, alpha_bar)
        (picture,) = model.decode(x_t.to(model.device))
        found.append(NoiseLevel(timestep=timestep, alpha_bar=alpha_bar.item(), latents=x_t, picture=picture))
    return found


def channel_pictures(latents: Tensor) -> list[Image.Image]:
    """Each channel of (1, 4, H, W) latents as a grey picture, from black (-3) to white (3), noise's usual range."""
    grey = ((latents[0].clamp(-3, 3) + 3) * (255 / 6)).round().to(torch.uint8)
    return [Image.fromarray(channel.numpy()) for channel in grey]
