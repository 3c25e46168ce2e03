"""Samplers: generators that lead from noise to clean latents, one file per algorithm.

All have the same shape, `sampler(predict_eps, x, steps, ...)`, and yield the latents after every step. None knows a
network: `predict_eps(x_t, timestep)` is all they see of it.
"""

from sd.samplers.ddim import ddim
from sd.samplers.ddpm import ddpm

SAMPLERS = {"ddim": ddim, "ddpm": ddpm}

__all__ = ["SAMPLERS", "ddim", "ddpm"]
