"""DPM-Solver++(2S) with fresh noise: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models" (2022), algorithm 1, with each step's intermediate point midway in lambda.

`dpmpp_2s_a` adds noise after the step, `dpmpp_sde` also at the intermediate point.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.ancestral import level_down, renoise
from sd.sampling.samplers.dpm2 import halfway
from sd.sampling.samplers.dpmpp_2m import sde_step
from sd.sampling.schedule import Step, sigma_of, x_0_from_eps


def dpmpp_2s_a(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step. Each way down is of order 2.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once per step that does not end without noise
    eta         0 to 1, the share of fresh noise; 0 is DPM-Solver++(2S) itself

    A step that ends without noise goes straight to the predicted x_0. So N steps cost 2 N - 1 predictions.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        alpha_bar_down = level_down(alpha_bar, alpha_bar_prev, eta)
        x_0 = x_0_from_eps(x, predict_eps(x, alpha_bar), alpha_bar)
        if alpha_bar_down < 1:
            middle = halfway(alpha_bar, alpha_bar_down)
            u = sde_step(x, x_0, alpha_bar, middle)
            x_0 = x_0_from_eps(u, predict_eps(u, middle), middle)
        x = sde_step(x, x_0, alpha_bar, alpha_bar_down)
        x = renoise(x, alpha_bar_down, alpha_bar_prev, draw_noise)
        yield x


def dpmpp_sde(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn twice per step that does not end without noise
    eta         0 to 1, the share of fresh noise

    The paths to the middle and to the end of a step both start at its beginning, so their noises must come from one
    Brownian path, whose time is sigma: the second noise contains the first (`whole_step_noise`). Independent noises
    would lower the order in distribution from 2 to 1. Steps do not overlap, so no Brownian tree is needed: it would
    only make runs with different numbers of steps alike. N steps cost 2 N - 1 predictions.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        x_0 = x_0_from_eps(x, predict_eps(x, alpha_bar), alpha_bar)
        if alpha_bar_prev < 1:
            middle = halfway(alpha_bar, alpha_bar_prev)
            first = draw_noise() if eta else 0
            u = noisy_step(x, x_0, alpha_bar, middle, eta, first)
            x_0 = x_0_from_eps(u, predict_eps(u, middle), middle)
            both = whole_step_noise(first, draw_noise() if eta else 0, alpha_bar, middle, alpha_bar_prev)
            x = noisy_step(x, x_0, alpha_bar, alpha_bar_prev, eta, both)
        else:
            x = x_0
        yield x


def noisy_step(
    x: Tensor, x_0: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float, noise: Tensor | float
) -> Tensor:
    """One ancestral step with x_0 taken as constant, and with the given noise."""
    alpha_bar_down = level_down(alpha_bar, alpha_bar_prev, eta)
    x = sde_step(x, x_0, alpha_bar, alpha_bar_down)
    return renoise(x, alpha_bar_down, alpha_bar_prev, lambda: noise)


def whole_step_noise(first: Tensor, second: Tensor, start: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """Standard normal noise for a whole step, from the noises of its two halves.

    first, second       (B, 4, H, W)  standard normal, independent
    start, middle, end  alpha_bar at the start, the middle and the end of the step

    The increments of a Brownian path over the halves add up; each has the root of its time as standard deviation.
    """
    sigma, sigma_middle, sigma_end = sigma_of(start), sigma_of(middle), sigma_of(end)
    whole = (sigma - sigma_middle).sqrt() * first + (sigma_middle - sigma_end).sqrt() * second
    return whole / (sigma - sigma_end).sqrt()
