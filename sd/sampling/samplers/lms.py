"""Linear multistep: the Adams-Bashforth method for steps of any length, in sigma. The ODE, dx/dsigma = eps, is that of
Karras et al. (2022), eq. 1 and 3; the method is in Hairer, Nørsett & Wanner, "Solving Ordinary Differential
Equations I", III.5.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.euler import euler_step
from sd.sampling.schedule import Step, sigma_of


def adams_bashforth(sigmas: Sequence[float], start: float, end: float) -> list[float]:
    """Weights of past directions: their Lagrange polynomials, averaged over sigmas from start to end.

    sigmas   where directions are known, at most 4
    returns  one weight for each; their sum is 1

    Two-point Gauss-Legendre quadrature is exact here, since the degree is at most 3.
    """

    def lagrange(j: int, sigma: float) -> float:
        return math.prod((sigma - other) / (sigmas[j] - other) for k, other in enumerate(sigmas) if k != j)

    middle, reach = (start + end) / 2, (end - start) / (2 * math.sqrt(3))
    return [(lagrange(j, middle - reach) + lagrange(j, middle + reach)) / 2 for j in range(len(sigmas))]


def lms(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
    order: int = 4,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step. draw_noise is not used.

    order  1 to 4, how many past directions count; fewer in the first steps

    Raises ValueError for another order.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1 to 4, got {order}")
    past: list[tuple[float, Tensor]] = []  # sigma and eps, newest last
    for _, alpha_bar, alpha_bar_prev in steps:
        sigma, sigma_prev = sigma_of(alpha_bar).item(), sigma_of(alpha_bar_prev).item()
        past = [*past, (sigma, predict_eps(x, alpha_bar))][-order:]
        weights = adams_bashforth([sigma for sigma, _ in past], sigma, sigma_prev)
        eps = sum(weight * eps for weight, (_, eps) in zip(weights, past, strict=True))
        x = euler_step(x, eps, alpha_bar, alpha_bar_prev)
        yield x
