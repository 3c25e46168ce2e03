"""The noise schedule: how much of the picture is left at each timestep, and which timesteps a sampler visits.

alphas_cumprod is the table of alpha_bar for t = 0 … 999: the share of the signal's power in
x_t = sqrt(alpha_bar) * x_0 + sqrt(1 - alpha_bar) * eps (Ho et al., 2020, eq. 4).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sd.config import ScheduleConfig


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """The table of alpha_bar, falling with the timestep.

    returns  (timesteps,) float32

    Betas are the squares of an even grid between the square roots of the two ends, computed in float64 and rounded
    once, as in the original training code. For Stable Diffusion the first entry is 0.99915, the last 0.00466.
    """
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0).float()


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process in one go: x_t from x_0. Ho et al. (2020), eq. 4."""
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def leading(total: int, steps: int) -> Tensor:
    """1, 1 + c, 1 + 2c, … with c = total // steps: the original's DDIM spacing, which never visits the noisiest end.

    Where c does not divide the total, the original takes as many as fit (31 for 30 steps); here, as in diffusers, there
    are as many as asked for. The original adds 1 to every timestep and so leaves the table where steps = total; here
    the offset is dropped there.
    """
    stride = total // steps
    offset = min(1, total - 1 - stride * (steps - 1))
    return (torch.arange(steps) * stride + offset).flip(0)


def trailing(total: int, steps: int) -> Tensor:
    """Even steps back from the noisiest timestep: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are
    Flawed" (2023), table 2."""
    return (total - torch.arange(steps, dtype=torch.float64) * total / steps).round().long() - 1


def linspace(total: int, steps: int) -> Tensor:
    """Even steps that include both ends: Lin et al. (2023), table 2. A single step starts at the noisiest end."""
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long()


SPACINGS = {"leading": leading, "trailing": trailing, "linspace": linspace}


class Step(NamedTuple):
    """One step of a sampler."""

    timestep: Tensor  # () int64
    alpha_bar: Tensor  # () float64, before the step
    alpha_bar_prev: Tensor  # () float64, after it; nearer to 1


def sampling_steps(table: Tensor, steps: int, *, spacing: str = "leading", final_alpha: str = "first") -> list[Step]:
    """The steps from noise to picture.

    table        (timesteps,) alpha_bar by timestep
    steps        1 to the number of timesteps
    spacing      which timesteps: "leading" (the original's), "trailing" or "linspace"
    final_alpha  alpha_bar after the last step: "first", the first entry of the table, as the original does and as these
                 networks are usually run; or "one", no noise at all, as the papers say

    Raises ValueError for other values.
    """
    total = len(table)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be 1 to {total}, got {steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    finals = {"first": table[:1], "one": torch.ones_like(table[:1])}
    if final_alpha not in finals:
        raise ValueError(f"final_alpha must be one of {', '.join(finals)}, got {final_alpha!r}")
    timesteps = SPACINGS[spacing](total, steps)
    alpha_bars = torch.cat([table[timesteps], finals[final_alpha]]).double()
    return [Step(*row) for row in zip(timesteps, alpha_bars[:-1], alpha_bars[1:], strict=True)]
