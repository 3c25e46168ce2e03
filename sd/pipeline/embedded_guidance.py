"""Guidance in one prediction, for UNets distilled so that they take the guidance scale as an input.

Meng et al., "On Distillation of Guided Diffusion Models" (2023), section 3.1; Luo et al., "Latent Consistency Models"
(2023), section 4.2, which distils with a range of scales at once.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sd.pipeline.settings import Settings


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """A guidance scale as the UNet takes it: (1, width) float32, first the sines, then the cosines.

    Of w = guidance_scale - 1, which is 0 without guidance, times 1000. It is not quite the embedding of timesteps: the
    sines are first, and the frequencies reach 1 / 10000. This is how the published networks were trained.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10_000) / (half - 1))
    angles = 1000 * (guidance_scale - 1) * torch.exp(exponents)
    return torch.cat([angles.sin(), angles.cos()])[None]


def with_guidance(unet: Callable[..., Tensor], embedding: Tensor) -> Callable[..., Tensor]:
    """A UNet that is given the embedded guidance scale (1, width) at every call."""

    def predict(x: Tensor, timestep: Tensor, *given: Tensor) -> Tensor:
        return unet(x, timestep, *given, guidance=embedding)

    return predict


def without_negative(settings: Settings) -> Settings:
    """The settings of a run of such a UNet: one prediction for each picture, and none for the negative prompt."""
    return replace(settings, guidance_scale=1.0)
