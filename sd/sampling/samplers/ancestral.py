"""Ancestral sampling: each step removes more noise than asked for, then adds fresh noise.

How much more is as in Song et al., "Denoising Diffusion Implicit Models" (2021), eq. 16; fresh noise is added by the
forward process. Any solver can do the way down: Euler here, others in `dpm2` and `dpmpp_2s`.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.euler import euler_step
from sd.sampling.schedule import Step, add_noise, alpha_bar_of, sigma_of


def level_down(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """The alpha_bar to step down to, so that fresh noise then leads back up to alpha_bar_prev. With eta 0, that itself.

    Song et al. (2021), eq. 16: with eta = 1 as much noise is replaced as in the posterior of the forward process.
    Raises ValueError if eta is not 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be 0 to 1, got {eta:g}")
    sigma, sigma_prev = sigma_of(alpha_bar), sigma_of(alpha_bar_prev)
    replaced = eta * sigma_prev * (1 - (sigma_prev / sigma) ** 2).sqrt()
    return alpha_bar_of((sigma_prev**2 - replaced**2).sqrt()) if eta else alpha_bar_prev


def renoise(x: Tensor, alpha_bar_down: Tensor, alpha_bar_prev: Tensor, draw_noise: Callable[[], Tensor]) -> Tensor:
    """Go back up to alpha_bar_prev with fresh noise, which is drawn only if there is any to add."""
    if alpha_bar_down > alpha_bar_prev:
        x = add_noise(x, draw_noise(), alpha_bar_prev / alpha_bar_down)
    return x


def euler_a(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor],
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once per step that does not end without noise
    eta         0 to 1, the share of fresh noise; 0 makes it `euler`

    It equals DDIM with the same eta, and DDPM with eta 1, both written without scaling the signal down.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        alpha_bar_down = level_down(alpha_bar, alpha_bar_prev, eta)
        x = euler_step(x, predict_eps(x, alpha_bar), alpha_bar, alpha_bar_down)
        x = renoise(x, alpha_bar_down, alpha_bar_prev, draw_noise)
        yield x
