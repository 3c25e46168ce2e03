"""DPM-Solver++(2S) with fresh noise: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models" (2022), algorithm 1 with the middle of each step half-way in lambda.

Noise can be added once, after the step (2S a), or also in its middle (SDE).
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.ancestral import way_down, way_up
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
    """From noise to clean latents; yields the latents after every step. Order 2 on each way down.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once a step that does not end without noise
    eta         0 to 1, the share of fresh noise; 0 is DPM-Solver++(2S) itself

    A step that ends without noise takes x_0 as it is. So N steps cost 2 N - 1 predictions.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        alpha_bar_down = way_down(alpha_bar, alpha_bar_prev, eta)
        x_0 = x_0_from_eps(x, predict_eps(x, alpha_bar), alpha_bar)
        if alpha_bar_down < 1:
            middle = halfway(alpha_bar, alpha_bar_down)
            u = sde_step(x, x_0, alpha_bar, middle)
            x_0 = x_0_from_eps(u, predict_eps(u, middle), middle)
        x = sde_step(x, x_0, alpha_bar, alpha_bar_down)
        x = way_up(x, alpha_bar_down, alpha_bar_prev, draw_noise)
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

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn twice a step that does not end without noise
    eta         0 to 1, the share of fresh noise

    The way to the middle and the way to the end of a step start at the same place, so their noises are those of one
    Brownian path, whose time is sigma: the second one contains the first (`whole_step_noise`). With independent noises
    the order in distribution falls from 2 to 1. Different steps do not overlap and their noises are independent, so no
    Brownian tree is needed, which would only make runs with different numbers of steps alike. N steps cost 2 N - 1
    predictions.
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
    """Down with x_0 taken to be constant, and up again with the given noise."""
    alpha_bar_down = way_down(alpha_bar, alpha_bar_prev, eta)
    x = sde_step(x, x_0, alpha_bar, alpha_bar_down)
    return way_up(x, alpha_bar_down, alpha_bar_prev, lambda: noise)


def whole_step_noise(first: Tensor, second: Tensor, start: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """Standard normal noise for a whole step, from that of its two halves.

    first, second       (B, 4, H, W)  standard normal, independent
    start, middle, end  alpha_bar at the step's ends and between

    A Brownian path's way over the whole is the sum of its ways over the halves, each as long as the root of its time.
    """
    sigma, sigma_middle, sigma_end = sigma_of(start), sigma_of(middle), sigma_of(end)
    whole = (sigma - sigma_middle).sqrt() * first + (sigma_middle - sigma_end).sqrt() * second
    return whole / (sigma - sigma_end).sqrt()
