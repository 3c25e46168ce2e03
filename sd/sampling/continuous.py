"""Noise levels without timesteps: the UNet is told the logarithm of sigma.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), section 5. There, latents
have the standard deviation sigma_data, and x is not scaled down with the noise. Here, latents are in units of
sigma_data, and x_t = sqrt(alpha_bar) * x_0 + sqrt(1 - alpha_bar) * eps as everywhere, with sigma / sigma_data for the
noise level. That x_t is the input of the UNet, c_in * x in eq. 7, and so its output F is the velocity with the opposite
sign.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sd.config import ScheduleConfig


def log_uniform(config: ScheduleConfig) -> Tensor:
    """The table of alpha_bar whose sigmas rise by one factor from entry to entry: (timesteps,) float64.

    Schedules choose among its entries as among timesteps. In float32, the smallest sigmas would be lost.
    """
    lowest, highest = (math.log(sigma / config.sigma_data) for sigma in (config.sigma_min, config.sigma_max))
    sigmas = torch.linspace(lowest, highest, config.timesteps, dtype=torch.float64, device="cpu").exp()
    return 1 / (1 + sigmas**2)


def told_log_sigma(unet: Callable[..., Tensor], config: ScheduleConfig) -> Callable[..., Tensor]:
    """A UNet that is called with a place in this table, and is told ln(sigma) / 4: Karras et al. (2022), table 1."""
    lowest, highest = (math.log(sigma) / 4 for sigma in (config.sigma_min, config.sigma_max))

    def predict(x: Tensor, timestep: Tensor, *given: Tensor, **named: Tensor) -> Tensor:
        return unet(x, lowest + (highest - lowest) * timestep / (config.timesteps - 1), *given, **named)

    return predict
