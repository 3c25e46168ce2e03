"""Samplers: generators that lead from noise to clean latents, one file per algorithm.

All have one signature, `sampler(predict_eps, x, steps, *, draw_noise, ...)`, and yield the latents after every step.

predict_eps  (x_t, alpha_bar) -> eps, at any noise level; samplers see no more of the network
x            (B, 4, H, W)  standard normal noise; always in the network's own scale, with a variance of about 1
steps        the noise levels to visit, from `sd.sampling.schedule.sampling_steps`
draw_noise   () -> (B, 4, H, W)  standard normal noise; only samplers that add noise call it
"""

from sd.sampling.samplers.ancestral import euler_a
from sd.sampling.samplers.ddim import ddim
from sd.sampling.samplers.ddpm import ddpm
from sd.sampling.samplers.dpm2 import dpm2, dpm2_a
from sd.sampling.samplers.dpmpp_2m import dpmpp_2m, dpmpp_2m_sde
from sd.sampling.samplers.dpmpp_2s import dpmpp_2s_a, dpmpp_sde
from sd.sampling.samplers.euler import euler
from sd.sampling.samplers.heun import heun
from sd.sampling.samplers.lcm import lcm
from sd.sampling.samplers.lms import lms
from sd.sampling.samplers.plms import plms
from sd.sampling.samplers.unipc import unipc

SAMPLERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "lms": lms,
    "dpm2": dpm2,
    "dpm2_a": dpm2_a,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "lcm": lcm,
}

__all__ = ["SAMPLERS", *SAMPLERS]
