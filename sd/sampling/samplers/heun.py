"""Heun's method: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022)."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.euler import euler_step
from sd.sampling.schedule import Step


def heun(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step. Order 2; draw_noise is not used.

    Each step is an Euler step repeated with the mean of the directions at both its ends. At an end without noise there
    is no direction, so that step stays Euler's. So N steps cost 2 N - 1 predictions.

    Karras et al. (2022), algorithm 1.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        eps = predict_eps(x, alpha_bar)
        end = euler_step(x, eps, alpha_bar, alpha_bar_prev)
        if alpha_bar_prev < 1:
            eps_end = predict_eps(end, alpha_bar_prev)
            end = euler_step(x, (eps + eps_end) / 2, alpha_bar, alpha_bar_prev)
        x = end
        yield x
