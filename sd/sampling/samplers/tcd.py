"""TCD: Zheng et al., "Trajectory Consistency Distillation" (2024), for networks distilled to need only a few steps."""

from collections.abc import Callable, Iterator

from torch import Tensor

from sd.sampling.samplers.ancestral import renoise
from sd.sampling.samplers.ddim import ddim_step
from sd.sampling.schedule import Steps, alpha_bar_at, timestep_at


def strategic_level(table: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """alpha_bar at timestep s = floor((1 - gamma) t'), from which noise leads back to t', where the step ends.

    table           (timesteps,) alpha_bar by timestep
    alpha_bar_prev  () at t'; if it is beyond the table's first entry, there is no such timestep and it is returned
    eta             0 to 1: gamma

    Zheng et al. (2024), strategic stochastic sampling. Raises ValueError for other values of eta.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be 0 to 1, got {eta:g}")
    if not eta or alpha_bar_prev > table[0]:
        return alpha_bar_prev
    return alpha_bar_at(table, ((1 - eta) * timestep_at(table, alpha_bar_prev)).floor()[None])[0]


def tcd(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Steps,
    *,
    draw_noise: Callable[[], Tensor],
    eta: float = 0.3,
) -> Iterator[Tensor]:
    """From noise to clean latents, each step past its end and back into noise; yields the latents after every step.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once per step that is not the last
    eta         0 to 1: gamma, how far past the end; 0 adds no noise and makes it DDIM, 1 always goes to timestep 0

    Zheng et al. (2024), strategic stochastic sampling.
    """
    for _, alpha_bar, alpha_bar_prev in steps:
        alpha_bar_s = strategic_level(steps.table, alpha_bar_prev, eta)
        x = ddim_step(x, predict_eps(x, alpha_bar), alpha_bar, alpha_bar_s)
        x = renoise(x, alpha_bar_s, alpha_bar_prev, draw_noise)
        yield x
