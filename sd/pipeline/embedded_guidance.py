"""Guidance in one prediction, for UNets distilled so that they take the guidance scale as an input.

Meng et al., "On Distillation of Guided Diffusion Models" (2023), section 3.1; Luo et al., "Latent Consistency Models"
(2023), section 4.2, which distils with a range of scales at once.
"""

import math

import torch
from torch import Tensor


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """A guidance scale as the UNet takes it: (1, width) float32, first the sines, then the cosines.

    Of w = guidance_scale - 1, which is 0 without guidance, times 1000. It is not quite the embedding of timesteps: the
    sines are first, and the frequencies reach 1 / 10000. This is how the published networks were trained.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10_000) / (half - 1))
    angles = 1000 * (guidance_scale - 1) * torch.exp(exponents)
    return torch.cat([angles.sin(), angles.cos()])[None]
