"""DDPM: Ho et al., "Denoising Diffusion Probabilistic Models" (2020)."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.schedule import Step, x_0_from_eps


def ddpm_posterior(x_t: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_(t-1), given x_t and the x_0 that eps implies.

    x_t, eps                   (B, 4, H, W)  noisy latents and the noise predicted in them
    alpha_bar, alpha_bar_prev  scalars in (0, 1], signal power before and after; the second is larger
    returns                    (B, 4, H, W) and a scalar

    Ho et al. (2020), eq. 6 and 7. Over more than one timestep, alpha is the ratio of the two alpha_bar: Nichol &
    Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), section 4.
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    x_0 = x_0_from_eps(x_t, eps, alpha_bar)
    mean = (alpha_bar_prev.sqrt() * beta * x_0 + alpha.sqrt() * (1 - alpha_bar_prev) * x_t) / (1 - alpha_bar)
    return mean, beta * (1 - alpha_bar_prev) / (1 - alpha_bar)


def ddpm(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor],
) -> Iterator[Tensor]:
    """From noise to clean latents by ancestral sampling; yields the latents after every step.

    predict_eps  (x_t, alpha_bar) -> eps
    x            (B, 4, H, W)  standard normal noise
    draw_noise   () -> (B, 4, H, W)  standard normal noise, drawn once per step unless the step's variance is 0

    Ho et al. (2020), algorithm 2, with the smaller of its two variances (beta tilde, eq. 7).
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        mean, variance = ddpm_posterior(x, predict_eps(x, alpha_bar), alpha_bar, alpha_bar_prev)
        x = mean + variance.sqrt() * draw_noise() if variance > 0 else mean
        yield x
