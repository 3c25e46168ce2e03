"""UniPC: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (2023).

Predictor (UniP) and corrector (UniC) are one formula: the corrector also knows x_0 as predicted at the step's end.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sd.sampling.samplers.dpmpp_2m import log_ratio, sde_step
from sd.sampling.schedule import Step, x_0_from_eps

Known = tuple[Tensor, Tensor]  # alpha_bar, and x_0 as predicted there


def unified_weights(distances: Sequence[float], h: float) -> list[float]:
    """The weights rho of the slopes that make a step exact for polynomials in lambda.

    distances  of the other known x_0 from the start of the step, in steps: below 0 before it, 1 at its end
    h          the length of the step in lambda

    Zhao et al. (2023), R rho = phi / B with B(h) = exp(-h) - 1, for networks that predict x_0. A single slope gets 1/2,
    the limit for short steps.
    """
    if len(distances) == 1:
        return [0.5]
    phi = math.expm1(-h) / -h - 1
    targets = []
    for k in range(1, len(distances) + 1):
        targets.append(math.factorial(k) * phi / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(k + 1)
    powers = [[distance**k for distance in distances] for k in range(len(distances))]
    return torch.linalg.solve(
        torch.tensor(powers, dtype=torch.float64, device="cpu"),
        torch.tensor(targets, dtype=torch.float64, device="cpu"),
    ).tolist()


def unified_step(
    x: Tensor, known: Sequence[Known], alpha_bar_prev: Tensor, end: Tensor | None = None, variant: str = "bh2"
) -> Tensor:
    """From the newest known noise level to alpha_bar_prev.

    x        (B, 4, H, W)  latents at the newest known level
    known    x_0 as predicted there and before, newest last
    end      (B, 4, H, W)  x_0 as predicted at alpha_bar_prev, for the corrector; None for the predictor
    variant  which B(h): "bh1" is -h, "bh2" exp(-h) - 1. It cancels out except where a single slope gets 1/2
    returns  (B, 4, H, W)
    """
    alpha_bar, x_0 = known[-1]
    plain = sde_step(x, x_0, alpha_bar, alpha_bar_prev)
    h = log_ratio(alpha_bar, alpha_bar_prev)
    others = [(-log_ratio(before, alpha_bar) / h, x_0_before) for before, x_0_before in known[-2::-1]]
    if end is not None:
        others.append((1.0, end))
    if not others:
        return plain
    weights = unified_weights([distance for distance, _ in others], h)
    if variant == "bh1" and len(weights) == 1:
        weights = [weights[0] * -h / math.expm1(-h)]
    slopes = sum(rho * (other - x_0) / distance for rho, (distance, other) in zip(weights, others, strict=True))
    return plain - alpha_bar_prev.sqrt() * math.expm1(-h) * slopes


def unipc(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
    order: int = 2,
    variant: str = "bh2",
) -> Iterator[Tensor]:
    """From noise to clean latents; yields the latents after every step, before they are corrected.

    order    1 to 3, how many past x_0 the predictor uses; fewer in the first steps, and in the last as its authors
             advise. The corrector, which costs no prediction, raises the order of accuracy by one, up to 3.
    variant  "bh1" or "bh2", see `unified_step`

    draw_noise is not used. Raises ValueError for another order. Zhao et al. (2023), UniPC-p.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1 to 3, got {order}")
    known: list[Known] = []
    x_before = x
    for i, (_, alpha_bar, alpha_bar_prev) in enumerate(steps):
        x_0 = x_0_from_eps(x, predict_eps(x, alpha_bar), alpha_bar)
        if known:
            x = unified_step(x_before, known, alpha_bar, x_0, variant)
        known = [*known, (alpha_bar, x_0)][-min(order, len(steps) - i) :]
        x_before = x
        x = unified_step(x, known, alpha_bar_prev, None, variant)
        yield x


def unipc_bh1(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """UniPC-3 with B(h) = -h: what the web UI and ComfyUI call UniPC."""
    return unipc(predict_eps, x, steps, order=3, variant="bh1")


def unipc_bh2(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """UniPC-3 with B(h) = exp(-h) - 1: ComfyUI's uni_pc_bh2."""
    return unipc(predict_eps, x, steps, order=3)
