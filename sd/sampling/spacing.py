"""Schedules: which noise levels a sampler visits, under the names that the field uses.

Functions in TIMESTEPS choose timesteps: (total, steps) -> (steps,) falling, not always whole. Functions in SIGMAS
choose sigmas between those at the ends of the table: (lowest, highest, steps) -> (steps,) falling. Both in float64.
"""

import torch
from torch import Tensor


def leading(total: int, steps: int) -> Tensor:
    """1, 1 + c, 1 + 2c, … with c = total // steps: the original's DDIM spacing, which never visits the noisiest end.

    If c does not divide the total, the original takes as many as fit (31 for 30 steps); here, as in diffusers, there
    are as many as asked for. The original adds 1 to every timestep and so leaves the table if steps = total; here the
    offset is dropped in that case.
    """
    stride = total // steps
    offset = min(1, total - 1 - stride * (steps - 1))
    return (torch.arange(steps, dtype=torch.float64, device="cpu") * stride + offset).flip(0)


def trailing(total: int, steps: int) -> Tensor:
    """Even steps back from the noisiest timestep: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are
    Flawed" (2023), table 2."""
    return (total - torch.arange(steps, dtype=torch.float64, device="cpu") * total / steps).round() - 1


def linspace(total: int, steps: int) -> Tensor:
    """Even steps that include both ends: Lin et al. (2023), table 2. A single step starts at the noisiest end."""
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64, device="cpu").round()


def normal(total: int, steps: int) -> Tensor:
    """`linspace`, not rounded: ComfyUI's "normal", and "Uniform" in the web UI, which are k-diffusion's."""
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64, device="cpu")


def sgm_uniform(total: int, steps: int) -> Tensor:
    """Even steps between both ends without the last one: as in Stability's generative-models, but not rounded down."""
    return torch.linspace(total - 1, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]


def simple(total: int, steps: int) -> Tensor:
    """Every (total / steps)-th entry of the table from its noisy end, rounded up: nearly `trailing`."""
    return total - 1 - (torch.arange(steps, dtype=torch.float64, device="cpu") * total / steps).floor()


def beta(total: int, steps: int, shape: float = 0.6) -> Tensor:
    """Timesteps spread like a Beta(0.6, 0.6) distribution: densest at both ends.

    Lee et al., "Beta Sampling is All You Need" (2024). Not rounded, so that no timestep repeats.
    """
    shares = 1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps
    return (total - 1) * beta_quantile(shares, shape)


def distilled(total: int, steps: int, grid: int = 50) -> Tensor:
    """Some of the 50 timesteps 999, 979, … 19 that latent consistency models are distilled at, spread evenly.

    More steps than 50, which such a network never saw, are `trailing`. Luo et al., "Latent Consistency Models" (2023),
    section 4.3, with the skipping interval k = 20.
    """
    grid = total if steps > grid else grid
    places = (torch.arange(steps, dtype=torch.float64, device="cpu") * grid / steps).floor()
    return total - 1 - places * (total // grid)


def karras(lowest: Tensor, highest: Tensor, steps: int, rho: float = 7.0) -> Tensor:
    """Even in sigma ** (1 / rho): short steps at little noise.

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), eq. 5.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    return torch.lerp(highest ** (1 / rho), lowest ** (1 / rho), ramp) ** rho


def beta_sigmas(lowest: Tensor, highest: Tensor, steps: int) -> Tensor:
    """Sigmas, not timesteps, spread like a Beta(0.6, 0.6) distribution, with both ends: "Beta" in the web UI.

    Few steps are at little noise: with 5, they are at 14.6, 12.1, 7.3, 2.6 and 0.03.
    """
    shares = torch.linspace(1, 0, steps, dtype=torch.float64, device="cpu")
    return torch.lerp(lowest, highest, beta_quantile(shares, 0.6))


def exponential(lowest: Tensor, highest: Tensor, steps: int) -> Tensor:
    """Even in log(sigma), which DPM-Solver's authors call uniform in logSNR: Lu et al., "DPM-Solver" (2022)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    return torch.lerp(highest.log(), lowest.log(), ramp).exp()


TIMESTEPS = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "beta": beta,
    "distilled": distilled,
}
SIGMAS = {"karras": karras, "exponential": exponential, "beta_sigmas": beta_sigmas}


def beta_quantile(shares: Tensor, shape: float) -> Tensor:
    """The quantiles of the distribution Beta(shape, shape): shares in [0, 1] -> points in [0, 1], float64.

    The distribution is symmetric, so the lower half is enough. There, each term of the distribution function's power
    series halves the error (Abramowitz & Stegun, 6.6.8 with 15.1.1). Bisection inverts it.
    """
    powers = torch.arange(60, dtype=torch.float64, device="cpu")
    # x ** shape * sum over n of x ** n * (1 - shape) (2 - shape) … (n - shape) / (n! (shape + n))
    growth = torch.cumprod(torch.cat([torch.ones_like(powers[:1]), (powers[1:] - shape) / powers[1:]]), dim=0)
    coefficients = growth / (shape + powers)

    def below(x: Tensor) -> Tensor:
        return x**shape * (coefficients * x[:, None] ** powers).sum(dim=1)

    half = torch.full((1,), 0.5, dtype=torch.float64, device="cpu")
    lower = torch.minimum(shares, 1 - shares)
    low, high = torch.zeros_like(lower), half.expand_as(lower)
    for _ in range(60):
        middle = (low + high) / 2
        enough = below(middle) / (2 * below(half)) >= lower
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(shares > 0.5, 1 - high, high)
