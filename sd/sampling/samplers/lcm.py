"""LCM: Luo et al., "Latent Consistency Models" (2023), for networks distilled to need only a few steps."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sd.sampling.schedule import Step, add_noise, x_0_from_eps

SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10.0  # as in the distillation


def consistency(x_t: Tensor, x_0: Tensor, timestep: Tensor) -> Tensor:
    """The consistency function: x_0, bent so that at timestep 0 it is x_t itself.

    The function f of Luo et al. (2023), with the scalings of Song et al., "Consistency Models" (2023), as distilled.
    """
    scaled = TIMESTEP_SCALE * timestep.double()
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip * x_t + c_out * x_0


def lcm(
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: Sequence[Step],
    *,
    draw_noise: Callable[[], Tensor],
) -> Iterator[Tensor]:
    """From noise to clean latents by jumps to x_0 and back into noise; yields the latents after every step.

    draw_noise  () -> (B, 4, H, W)  standard normal noise, drawn once per step that does not end without noise

    Luo et al. (2023), multistep latent consistency sampling. With ordinary networks, pictures are blurred.
    """
    for timestep, alpha_bar, alpha_bar_prev in steps:
        x = consistency(x, x_0_from_eps(x, predict_eps(x, alpha_bar), alpha_bar), timestep)
        if alpha_bar_prev < 1:
            x = add_noise(x, draw_noise(), alpha_bar_prev)
        yield x
