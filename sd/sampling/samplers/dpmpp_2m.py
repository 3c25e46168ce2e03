"""DPM-Solver++(2M) and its SDE variant: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models" (2022)."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.schedule import Step, sigma_of, x_0_from_eps


def sde_step(x: Tensor, x_0: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float = 0.0) -> Tensor:
    """One step with x_0 taken as constant; the caller then adds noise of `sde_noise_scale`.

    x, x_0                     (B, 4, H, W)  latents, and the clean latents predicted in them
    alpha_bar, alpha_bar_prev  scalars in (0, 1], noise levels before and after
    eta                        0 for the ODE, 1 for the SDE; in between, less noise
    returns                    (B, 4, H, W)

    Lu et al. (2022), the first-order formulas of DPM-Solver++ and SDE-DPM-Solver++, where exp(-h) is the ratio of the
    two sigmas. With eta 0 it is DDIM's step.
    """
    decay = sigma_of(alpha_bar_prev) / sigma_of(alpha_bar)  # exp(-h); 0 for a step that ends without noise
    kept = ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * decay**eta
    return kept * x + alpha_bar_prev.sqrt() * (1 - decay ** (1 + eta)) * x_0


def sde_noise_scale(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """The standard deviation of the fresh noise that a step of the SDE adds: sigma sqrt(1 - exp(-2 eta h))."""
    decay = sigma_of(alpha_bar_prev) / sigma_of(alpha_bar)
    return (1 - alpha_bar_prev).sqrt() * (1 - decay ** (2 * eta)).sqrt()


def log_ratio(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> float:
    """h, the length of a step in lambda = -log(sigma)."""
    return (sigma_of(alpha_bar) / sigma_of(alpha_bar_prev)).log().item()


def dpmpp_2m_sde(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once per step that does not end without noise
    eta         0 to 1, the share of fresh noise; 0 makes it `dpmpp_2m`

    Steps do not overlap, so their noises are independent and no Brownian path is needed: such a path would only make
    runs with different numbers of steps alike.

    x_0 is extrapolated, linearly in lambda, from its last two values to the middle of the step: Lu et al. (2022),
    algorithm 2. The first step, and one that ends without noise, take it as constant.

    Raises ValueError if eta is not 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be 0 to 1, got {eta:g}")
    x_0_before, h_before = None, None
    for _, alpha_bar, alpha_bar_prev in steps:
        x_0 = x_0_from_eps(x, predict_eps(x, alpha_bar), alpha_bar)
        h = log_ratio(alpha_bar, alpha_bar_prev)
        x_0_middle = x_0
        if x_0_before is not None and alpha_bar_prev < 1:
            x_0_middle = x_0 + (x_0 - x_0_before) * h / (2 * h_before)
        x = sde_step(x, x_0_middle, alpha_bar, alpha_bar_prev, eta)
        if eta and alpha_bar_prev < 1:
            x = x + sde_noise_scale(alpha_bar, alpha_bar_prev, eta) * draw_noise()
        x_0_before, h_before = x_0, h
        yield x


def dpmpp_2m(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2: `dpmpp_2m_sde` without fresh noise.

    Order 2, one prediction per step; draw_noise is not used.
    """
    return dpmpp_2m_sde(predict_eps, x, steps, draw_noise=None, eta=0.0)
