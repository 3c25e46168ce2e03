"""Names from other programs give what those programs give: their equations, written here as they stand there."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from oracles import relative_error
from sampling import TABLE, last, noise, some_network
from scipy.stats import beta as beta_distribution

from sd.config import SD_V1
from sd.pipeline.latent_diffusion import table_and_steps
from sd.pipeline.settings import Settings
from sd.sampling.samplers import find_sampler
from sd.sampling.schedule import alpha_bar_of, sigma_of

SIGMAS = ((1 - TABLE.double()) / TABLE.double()).sqrt().numpy()


def levels_there(schedule, n, discards):
    """n steps' sigmas and a 0 as the web UI computes them, in the words of k-diffusion."""
    n += discards
    lowest, highest = SIGMAS[0], SIGMAS[-1]
    if schedule == "Karras":
        ramp = np.linspace(0, 1, n)
        sigmas = (highest ** (1 / 7) + ramp * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7
    elif schedule == "Uniform":
        sigmas = np.exp(np.interp(np.linspace(999, 0, n), np.arange(1000), np.log(SIGMAS)))
    else:
        sigmas = [lowest + x * (highest - lowest) for x in beta_distribution.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6)]
    sigmas = [*sigmas, 0.0]
    return sigmas[:-2] + sigmas[-1:] if discards else sigmas


def dpm_2_there(sigmas, draws=None):
    """k-diffusion's sample_dpm_2, and with draws its ancestral variant, on latents that are not scaled down."""

    def direction(x, sigma):
        alpha_bar = alpha_bar_of(torch.tensor(sigma, dtype=torch.float64))
        return some_network(x * alpha_bar.sqrt(), alpha_bar)  # (x - denoised) / sigma

    x = noise()().double() / alpha_bar_of(torch.tensor(sigmas[0])).sqrt()
    for i, (sigma, end) in enumerate(pairwise(sigmas)):
        up = min(end, (end**2 * (sigma**2 - end**2) / sigma**2) ** 0.5) if draws else 0
        down = (end**2 - up**2) ** 0.5
        d = direction(x, sigma)
        if down > 0:
            middle = np.exp((np.log(sigma) + np.log(down)) / 2)
            d = direction(x + d * (middle - sigma), middle)
        x = x + d * (down - sigma)
        x = x + draws[i] * up if draws and end > 0 else x
    return x


def steps_here(**options):
    settings = Settings(prompt="", width=64, height=64, seed=1, **options)
    return settings, table_and_steps(SD_V1.schedule, settings)[1]


@pytest.mark.parametrize("count", [2, 5, 20])
@pytest.mark.parametrize(
    ("name", "schedule", "discards"),
    [
        ("DPM2", "Karras", True),
        ("DPM2 a", "Uniform", True),
        ("k_dpm_2", "Uniform", True),
        ("k_dpm_2_ancestral", "Karras", True),
        ("Euler", "Uniform", False),
        ("Heun", "Beta", False),
        ("DPM2", "Beta", True),
        ("uni_pc", "Uniform", True),
        ("DPM++ 2M", "Karras", False),
    ],
)
def test_levels_are_those_of_the_program_whose_name_it_is(name, schedule, discards, count):
    for options in ({"sampler": name, "schedule": schedule}, {"sampler": f"{name} {schedule}"}):
        _, steps = steps_here(steps=count, **options)
        found = [sigma_of(bar).item() for bar in (steps[0].alpha_bar, *(step.alpha_bar_prev for step in steps))]
        assert found == pytest.approx(levels_there(schedule, count, discards), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize(("name", "ancestral"), [("DPM2 Karras", False), ("DPM2 a Karras", True)])
def test_dpm2_of_the_web_ui_step_by_step(name, ancestral, count):
    settings, steps = steps_here(sampler=name, steps=count)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(count)]
    options = {"draw_noise": iter(draws).__next__} if ancestral else {}
    ours = last(find_sampler(settings.sampler)(some_network, noise()().double(), steps, **options))
    theirs = dpm_2_there(levels_there("Karras", count, True), draws if ancestral else None)
    assert relative_error(ours, theirs) < 1e-10


def test_unipc_of_the_web_ui_goes_evenly_from_999_to_0_and_ends_there():
    """In its UniPC, N steps are between N + 1 times from 1 to 1/1000; time t / 1000 is entry t - 1 of the table."""
    settings, steps = steps_here(sampler="UniPC", steps=20)
    assert [step.timestep.item() for step in steps] == pytest.approx(np.linspace(999, 0, 21)[:-1], abs=1e-3)
    assert steps[-1].alpha_bar_prev == TABLE[0]
    theirs = UniPCMultistepScheduler(solver_order=3, solver_type="bh1", trained_betas=None)
    theirs.set_timesteps(20)
    theirs.sigmas = torch.stack([sigma_of(bar) for bar in (steps[0].alpha_bar, *(s.alpha_bar_prev for s in steps))])
    x = noise()().double()
    for timestep, step in zip(theirs.timesteps, steps, strict=True):
        x = theirs.step(some_network(x, step.alpha_bar), timestep, x).prev_sample
    ours = last(find_sampler(settings.sampler)(some_network, noise()().double(), steps))
    assert relative_error(ours, x) < 1e-6
