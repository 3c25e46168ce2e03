"""DDIM: Song et al., "Denoising Diffusion Implicit Models" (2021)."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.schedule import Step, x_0_from_eps


def ddim_step(x_t: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, sigma: Tensor | float = 0) -> Tensor:
    """Move to the next noise level; the caller then adds noise of standard deviation `sigma`.

    x_t, eps                   (B, 4, H, W)  noisy latents and the noise predicted in them
    alpha_bar, alpha_bar_prev  scalars in (0, 1], signal power before and after; the second is larger
    sigma                      scalar; 0 for deterministic DDIM
    returns                    (B, 4, H, W)

    Song et al. (2021), eq. 12 without its last term.
    """
    x_0 = x_0_from_eps(x_t, eps, alpha_bar)
    return alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - sigma**2).sqrt() * eps


def ddim_noise_scale(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """The standard deviation of the fresh noise that a step adds: sigma in eq. 12, from eq. 16. eta = 1 is DDPM."""
    return eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()


def ddim(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    eta: float = 0.0,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step.

    predict_eps  (x_t, alpha_bar) -> eps
    x            (B, 4, H, W)  standard normal noise
    eta          0 to 1; 0: no fresh noise, so the picture depends on x alone; 1: as much as DDPM adds
    draw_noise   () -> (B, 4, H, W)  standard normal noise; required if eta > 0

    Song et al. (2021), eq. 12.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be 0 to 1, got {eta:g}")
    if eta and draw_noise is None:
        raise ValueError(f"eta {eta:g} adds noise at every step: give draw_noise")
    for _, alpha_bar, alpha_bar_prev in steps:
        sigma = ddim_noise_scale(alpha_bar, alpha_bar_prev, eta)
        x = ddim_step(x, predict_eps(x, alpha_bar), alpha_bar, alpha_bar_prev, sigma)
        if sigma > 0:
            x = x + sigma * draw_noise()
        yield x
