"""DPM-Solver-2: Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10
Steps" (2022), algorithm 1, in the form that the field calls dpm2: straight steps in sigma, as in Karras et al. (2022).
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.ancestral import level_down, renoise
from sd.sampling.samplers.euler import euler_step
from sd.sampling.schedule import Step, alpha_bar_of, sigma_of


def halfway(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """The noise level midway between two, in log(sigma)."""
    return alpha_bar_of((sigma_of(alpha_bar) * sigma_of(alpha_bar_prev)).sqrt())


def dpm2_a(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step. Each way down is of order 2.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once per step that does not end without noise
    eta         0 to 1, the share of fresh noise; 0 makes it `dpm2`

    Each way down follows the direction predicted at its middle, in log(sigma). A step that ends without noise has no
    middle and is an Euler step. So N steps cost 2 N - 1 predictions.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        alpha_bar_down = level_down(alpha_bar, alpha_bar_prev, eta)
        eps = predict_eps(x, alpha_bar)
        if alpha_bar_down < 1:
            middle = halfway(alpha_bar, alpha_bar_down)
            eps = predict_eps(euler_step(x, eps, alpha_bar, middle), middle)
        x = euler_step(x, eps, alpha_bar, alpha_bar_down)
        x = renoise(x, alpha_bar_down, alpha_bar_prev, draw_noise)
        yield x


def dpm2(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """`dpm2_a` without fresh noise: order 2; draw_noise is not used."""
    return dpm2_a(predict_eps, x, steps, draw_noise=None, eta=0.0)
