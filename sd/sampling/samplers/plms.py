"""PLMS: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds" (2022), as in the original scripts."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.samplers.ddim import ddim_step
from sd.sampling.schedule import Step

# Adams-Bashforth for steps of equal length, newest direction first; the last row is Liu et al.'s
WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step. Order 2; draw_noise is not used.

    Every step is DDIM's, along a weighted mean of past directions. The first step has no past: it is done twice, the
    second time along the mean of the directions at both its ends. So N steps cost N + 1 predictions.

    The weights assume evenly spaced timesteps; with others the order falls to 1.
    """
    past: list[Tensor] = []  # newest first
    for _, alpha_bar, alpha_bar_prev in steps:
        eps = predict_eps(x, alpha_bar)
        past = [eps, *past][:4]
        if len(past) > 1:
            eps = sum(weight * known for weight, known in zip(WEIGHTS[len(past)], past, strict=True))
        elif alpha_bar_prev < 1:
            end = ddim_step(x, eps, alpha_bar, alpha_bar_prev)
            eps = (eps + predict_eps(end, alpha_bar_prev)) / 2
        x = ddim_step(x, eps, alpha_bar, alpha_bar_prev)
        yield x
