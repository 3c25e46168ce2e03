"""Samplers: generators that lead from noise to clean latents, one file per algorithm.

All have one signature, `sampler(predict_eps, x, steps, *, draw_noise, ...)`, and yield the latents after every step.

predict_eps  (x_t, alpha_bar) -> eps, at any noise level; samplers see no more of the network
x            (B, 4, H, W)  standard normal noise; always in the network's own scale, with a variance of about 1
steps        the noise levels to visit, from `sd.sampling.schedule.sampling_steps`
draw_noise   () -> (B, 4, H, W)  standard normal noise; only samplers that add noise call it
"""

from collections.abc import Callable, Iterator
from importlib import import_module

from torch import Tensor

Sampler = Callable[..., Iterator[Tensor]]

SAMPLERS = {  # each sampler -> the file here that holds it
    "ddim": "ddim",
    "ddpm": "ddpm",
    "plms": "plms",
    "euler": "euler",
    "euler_a": "ancestral",
    "heun": "heun",
    "lms": "lms",
    "dpm2": "dpm2",
    "dpm2_a": "dpm2",
    "dpmpp_2s_a": "dpmpp_2s",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_sde": "dpmpp_2s",
    "dpmpp_2m_sde": "dpmpp_2m",
    "unipc": "unipc",
    "unipc_bh1": "unipc",
    "unipc_bh2": "unipc",
    "lcm": "lcm",
    "tcd": "tcd",
}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; its file is imported when it is first asked for."""
    return getattr(import_module(f"{__name__}.{SAMPLERS[name]}"), name)
