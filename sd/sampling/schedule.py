"""The noise schedule: how much of the picture is left at each timestep, and which noise levels a sampler visits.

alphas_cumprod is the table of alpha_bar for t = 0 … 999: the share of the signal's power in
x_t = sqrt(alpha_bar) * x_0 + sqrt(1 - alpha_bar) * eps (Ho et al., 2020, eq. 4).

A noise level can be given in three ways: as alpha_bar; as sigma = sqrt((1 - alpha_bar) / alpha_bar), the noise's
standard deviation if the signal is not scaled down; and as the timestep, which the network takes. Between two entries
of the table, the timestep is linear in log(sigma), as in most programs for these networks, and not a whole number.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd.config import ScheduleConfig
from sd.sampling.spacing import SIGMAS, TIMESTEPS

SMALLEST_ALPHA_BAR = 2.0**-24


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """The table of alpha_bar, falling with the timestep.

    returns  (timesteps,) float32

    The square roots of the betas are evenly spaced. All of it is computed in float64 and rounded once, as in the
    original training code. For Stable Diffusion the first entry is 0.99915, the last 0.00466.

    Without timesteps, as `sd.sampling.continuous` has them, it is in float64.
    """
    if config.sigma_max:
        from sd.sampling.continuous import log_uniform

        return log_uniform(config)
    roots = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64, device="cpu"
    )
    return torch.cumprod(1 - roots**2, dim=0).float()


def zero_terminal_snr(table: Tensor) -> Tensor:
    """Shift and stretch the table so that nothing of the picture is left at its end; its first entry stays.

    table    (timesteps,) alpha_bar by timestep
    returns  the same; for networks trained with it, which predict v

    The last entry is 2**-24 rather than 0, because all samplers divide by its root; in float32 no picture shows the
    difference. Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), algorithm 1.
    """
    roots = table.double().sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return (roots**2).clamp(min=SMALLEST_ALPHA_BAR).float()


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process in one step: x_t from x_0. Ho et al. (2020), eq. 4.

    Given the ratio alpha_bar_t / alpha_bar_s instead of alpha_bar, it leads from x_s to a noisier x_t.
    """
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def x_0_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents x_0 if eps is the noise in x_t: Ho et al. (2020), eq. 4 solved for x_0."""
    return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def sigma_of(alpha_bar: Tensor) -> Tensor:
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_of(sigma: Tensor) -> Tensor:
    return 1 / (1 + sigma**2)


def timestep_at(table: Tensor, alpha_bar: Tensor) -> Tensor:
    """The timestep of a noise level: linear in log(sigma) between entries of the table, clamped to its ends.

    table      (timesteps,) alpha_bar by timestep
    alpha_bar  any shape, float64
    returns    the same shape, float32; whole numbers at the table's own entries
    """
    log_sigmas, log_sigma = sigma_of(table.double()).log(), sigma_of(alpha_bar.double()).log()
    high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(table) - 1)
    low = high - 1
    weight = (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
    return (low + weight.clamp(0, 1)).float()


def alpha_bar_at(table: Tensor, timestep: Tensor) -> Tensor:
    """The inverse of `timestep_at`: (n,) timesteps within the table -> (n,) float64."""
    low = timestep.double().floor().long()
    weight = timestep.double() - low
    log_sigmas = sigma_of(table.double()).log()
    between = log_sigmas[low].lerp(log_sigmas[(low + 1).clamp(max=len(table) - 1)], weight)
    return torch.where(weight == 0, table[low].double(), alpha_bar_of(between.exp()))


class Step(NamedTuple):
    """One step of a sampler."""

    timestep: Tensor  # () float32
    alpha_bar: Tensor  # () float64, before the step
    alpha_bar_prev: Tensor  # () float64, after the step, so at the timestep before: larger, 1 without noise


class Steps(list[Step]):
    """The steps of a run, and the table that their noise levels are from: (timesteps,) alpha_bar by timestep."""

    def __init__(self, steps: Iterable[Step], table: Tensor):
        super().__init__(steps)
        self.table = table

    def __getitem__(self, index: int | slice) -> "Step | Steps":
        found = super().__getitem__(index)
        return Steps(found, self.table) if isinstance(index, slice) else found


def steps_through(table: Tensor, alpha_bars: Tensor) -> Steps:
    """The steps from each noise level to the next. alpha_bars (steps + 1,), rising."""
    alpha_bars = alpha_bars.double()
    rows = zip(timestep_at(table, alpha_bars[:-1]), alpha_bars[:-1], alpha_bars[1:], strict=True)
    return Steps((Step(*row) for row in rows), table)


def sampling_steps(
    table: Tensor,
    steps: int,
    *,
    schedule: str = "leading",
    final_alpha: str = "first",
    discard_penultimate: bool = False,
) -> Steps:
    """The steps from noise to picture.

    table        (timesteps,) alpha_bar by timestep
    steps        1 to the number of timesteps
    schedule     which noise levels: a name in `sd.sampling.spacing`, such as "leading" (the original's) or "karras"
    final_alpha  alpha_bar after the last step: "first", the first entry of the table, as in the original; or "one", no
                 noise at all, as in the papers
    discard_penultimate
                 choose one level more, and leave out the last before the end, as some programs do for some samplers

    Raises ValueError for other values.
    """
    total, count = len(table), steps + discard_penultimate
    if not 1 <= steps <= total - discard_penultimate:
        raise ValueError(f"steps must be 1 to {total - discard_penultimate}, got {steps}")
    if schedule in TIMESTEPS:
        alpha_bars = alpha_bar_at(table, TIMESTEPS[schedule](total, count))
    elif schedule in SIGMAS:
        lowest, highest = sigma_of(table.double())[[0, -1]]
        alpha_bars = alpha_bar_of(SIGMAS[schedule](lowest, highest, count))
    else:
        raise ValueError(f"schedule must be one of {', '.join([*TIMESTEPS, *SIGMAS])}, got {schedule!r}")
    finals = {"first": table[:1].double(), "one": torch.ones(1, dtype=torch.float64, device="cpu")}
    if final_alpha not in finals:
        raise ValueError(f"final_alpha must be one of {', '.join(finals)}, got {final_alpha!r}")
    return steps_through(table, torch.cat([alpha_bars[:steps], finals[final_alpha]]))


def custom_steps(table: Tensor, sigmas: Sequence[float]) -> Steps:
    """The steps through given noise levels, and a last step to no noise.

    sigmas  falling, above 0; a 0 at the end is optional

    Raises ValueError for other sigmas.
    """
    levels = list(sigmas[:-1] if len(sigmas) > 1 and sigmas[-1] == 0 else sigmas)
    if not levels or not all(later < sooner for sooner, later in zip(levels, [*levels[1:], 0.0], strict=True)):
        raise ValueError(
            f"sigmas must fall from step to step and be above 0, got {', '.join(f'{s:g}' for s in sigmas)}"
        )
    return steps_through(table, alpha_bar_of(torch.tensor([*levels, 0.0], dtype=torch.float64, device="cpu")))
