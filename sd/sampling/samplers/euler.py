"""Euler: follow the probability flow in straight steps. Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models" (2022), algorithm 1 without its correction."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.schedule import Step, sigma_of


def euler_step(x: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Go straight in the direction of eps: dx/dsigma = eps, for a signal that is not scaled down.

    x, eps                     (B, 4, H, W)  latents in the network's own scale, and a direction
    alpha_bar, alpha_bar_prev  scalars in (0, 1], noise levels before and after
    returns                    (B, 4, H, W)

    Karras et al. (2022), eq. 1 and 3 with sigma(t) = t. It equals DDIM's step.
    """
    x_unscaled = x / alpha_bar.sqrt()
    return alpha_bar_prev.sqrt() * (x_unscaled + (sigma_of(alpha_bar_prev) - sigma_of(alpha_bar)) * eps)


def euler(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step. Order 1; draw_noise is not used."""
    for _, alpha_bar, alpha_bar_prev in steps:
        x = euler_step(x, predict_eps(x, alpha_bar), alpha_bar, alpha_bar_prev)
        yield x
