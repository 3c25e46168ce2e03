"""Every step of every sampler against diffusers' scheduler of the same algorithm, with the same noise."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from oracles import relative_error
from sampling import TABLE, last, noise, some_network

from sd.sampling.names import SAMPLER_INFO, final_alpha
from sd.sampling.samplers import find_sampler
from sd.sampling.schedule import alpha_bar_of, sampling_steps, steps_through, timestep_at

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = {**BETAS, "clip_sample": False}
TRAILING, KARRAS = {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed):
    return torch.randn(2, 4, 8, 8, generator=seeded(seed))


class Draws:
    """Numbered noise, from 0."""

    def __init__(self):
        self.number = -1

    def __call__(self):
        self.number += 1
        return drawn(self.number)


def run_ours(sampler, steps, **options):
    """The latents after every step, the noise levels of all predictions, and their number up to each step."""
    asked, counts, latents = [], [], []

    def network(x, alpha_bar):
        asked.append(alpha_bar)
        return some_network(x, alpha_bar)

    for x in sampler(network, noise()(), steps, draw_noise=Draws(), **options):
        latents.append(x)
        counts.append(len(asked))
    return latents, asked, counts


def run_theirs(scheduler, asked, *, unscaled, step_options=lambda i: {}):
    """The latents after every call of their scheduler, in the network's scale.

    unscaled  whether their latents are not scaled down, so that they have the variance 1 + sigma ** 2
    """

    def scale(i):
        return (1 + scheduler.sigmas[i].double() ** 2).sqrt() if unscaled else 1

    sample, latents = scale(0) * noise()(), []
    for i, (timestep, alpha_bar) in enumerate(zip(scheduler.timesteps, asked, strict=True)):
        eps = some_network(scheduler.scale_model_input(sample, timestep), alpha_bar)
        sample = scheduler.step(eps, timestep, sample, **step_options(i)).prev_sample
        latents.append(sample / scale(i + 1))
    return latents


def levels(scheduler):
    """Their sigmas without the repetitions of two-stage methods, as our steps."""
    return steps_through(TABLE, alpha_bar_of(scheduler.sigmas.double().unique_consecutive()))


def assert_equal_steps(
    scheduler, sampler, *, unscaled, steps=None, step_options=lambda i: {}, told_within=0.01, **options
):
    """told_within  largest difference in timesteps: theirs come from float32, and in places are rounded"""
    ours, asked, counts = run_ours(find_sampler(sampler), steps or levels(scheduler), **options)
    theirs = run_theirs(scheduler, asked, unscaled=unscaled, step_options=step_options)
    assert counts[-1] == len(scheduler.timesteps)
    told = timestep_at(TABLE, torch.stack(asked))
    assert (told - scheduler.timesteps).abs().max() <= told_within
    errors = [relative_error(x, theirs[count - 1]) for x, count in zip(ours, counts, strict=True)]
    assert max(errors) < 2e-6


@pytest.mark.parametrize("spacing", [TRAILING, KARRAS])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("euler", EulerDiscreteScheduler),
        ("heun", HeunDiscreteScheduler),
        ("lms", LMSDiscreteScheduler),
        ("dpm2", KDPM2DiscreteScheduler),
    ],
)
def test_every_step_in_sigma_equals_diffusers(sampler, scheduler, spacing):
    if sampler == "lms":
        pytest.importorskip("scipy")
    theirs = scheduler(**BETAS, **spacing)
    theirs.set_timesteps(12)
    rounded = scheduler is KDPM2DiscreteScheduler and spacing is KARRAS
    assert_equal_steps(theirs, sampler, unscaled=True, told_within=0.51 if rounded else 0.01)


@pytest.mark.parametrize("spacing", [{"timestep_spacing": "leading", "steps_offset": 1}, TRAILING])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "calls"),  # the noise of a step comes with its last call
    [("euler_a", EulerAncestralDiscreteScheduler, 1), ("dpm2_a", KDPM2AncestralDiscreteScheduler, 2)],
)
def test_every_ancestral_step_equals_diffusers(sampler, scheduler, calls, spacing):
    theirs = scheduler(**BETAS, **spacing)
    theirs.set_timesteps(12)
    assert_equal_steps(theirs, sampler, unscaled=True, step_options=lambda i: {"generator": seeded(i // calls)})


@pytest.mark.parametrize(
    ("sampler", "options", "noises"),
    [
        ("dpmpp_2m", {}, lambda i: {}),
        ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}, lambda i: {"variance_noise": drawn(i)}),
    ],
)
def test_every_step_of_dpmpp_2m_equals_diffusers(sampler, options, noises):
    theirs = DPMSolverMultistepScheduler(**BETAS, **KARRAS, **options)
    theirs.set_timesteps(12)
    assert_equal_steps(theirs, sampler, unscaled=False, step_options=noises, told_within=0.51)  # rounded


def test_every_step_of_dpmpp_2s_without_noise_equals_diffusers():
    """diffusers' two-stage steps use every second noise level.

    Where the levels are even in log(sigma), the level between is the middle that we choose. It has no 2S with noise.
    """
    theirs = DPMSolverSinglestepScheduler(**BETAS, use_exponential_sigmas=True)
    theirs.set_timesteps(17)
    steps = steps_through(TABLE, alpha_bar_of(torch.cat([theirs.sigmas[:-1:2], theirs.sigmas[-1:]]).double()))
    assert_equal_steps(theirs, "dpmpp_2s_a", unscaled=False, steps=steps, eta=0.0, told_within=1)  # cut off


class BrownianPath:
    """One Brownian path over sigma; its piece i is draw i."""

    def __init__(self, steps):
        self.places, place, draws = {}, torch.zeros(2, 4, 8, 8), Draws()
        for step in steps[:-1]:
            ends = [((1 - bar) / bar).sqrt().item() for bar in (step.alpha_bar, step.alpha_bar_prev)]
            sigmas = [ends[0], (ends[0] * ends[1]) ** 0.5, ends[1]]
            self.places[round(sigmas[0], 4)] = place
            for start, end in ((0, 1), (1, 2)):
                place = place + (sigmas[start] - sigmas[end]) ** 0.5 * draws()
                self.places[round(sigmas[end], 4)] = place

    def __call__(self, start, end):
        way = self.places[round(end.item(), 4)] - self.places[round(start.item(), 4)]
        return way / (start - end).sqrt()


@pytest.mark.parametrize("spacing", [TRAILING, KARRAS])
def test_every_step_of_dpmpp_sde_equals_diffusers(spacing):
    pytest.importorskip("torchsde")
    from diffusers import DPMSolverSDEScheduler

    theirs = DPMSolverSDEScheduler(**BETAS, **spacing)
    theirs.set_timesteps(8)
    theirs.noise_sampler = BrownianPath(levels(theirs))
    assert_equal_steps(theirs, "dpmpp_sde", unscaled=True)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", [{**TRAILING, "final_sigmas_type": "zero"}, KARRAS])
def test_every_step_of_unipc_equals_diffusers(order, spacing):
    theirs = UniPCMultistepScheduler(**BETAS, **spacing, solver_order=order)
    theirs.set_timesteps(12)
    assert_equal_steps(theirs, "unipc", unscaled=False, order=order, told_within=1)  # cut off


@pytest.mark.parametrize(("sampler", "variant"), [("unipc_bh1", "bh1"), ("unipc_bh2", "bh2")])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_every_step_of_other_programs_unipc_equals_diffusers(sampler, variant, count):
    theirs = UniPCMultistepScheduler(**BETAS, **TRAILING, final_sigmas_type="zero", solver_order=3, solver_type=variant)
    theirs.set_timesteps(count)
    assert_equal_steps(theirs, sampler, unscaled=False, told_within=1)  # cut off


@pytest.mark.parametrize("count", [4, 20, 50])
def test_every_step_of_plms_equals_diffusers(count):
    theirs = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(count)
    steps = sampling_steps(TABLE, count, schedule="leading", final_alpha="first")
    ours, asked, counts = run_ours(find_sampler("plms"), steps)
    assert timestep_at(TABLE, torch.stack(asked)).tolist() == theirs.timesteps.tolist()
    expected = run_theirs(theirs, asked, unscaled=False)
    errors = [relative_error(x, expected[count - 1]) for x, count in zip(ours, counts, strict=True)]
    assert max(errors) < 2e-6


@pytest.mark.parametrize("count", [1, 4, 8])
def test_every_step_of_lcm_equals_diffusers(count):
    theirs = LCMScheduler(**BETAS)
    theirs.set_timesteps(count)
    steps = sampling_steps(TABLE, count, schedule=SAMPLER_INFO["lcm"].schedule, final_alpha="one")
    assert [step.timestep.item() for step in steps] == theirs.timesteps.tolist()
    ours, asked, _ = run_ours(find_sampler("lcm"), steps)
    expected = run_theirs(theirs, asked, unscaled=False, step_options=lambda i: {"generator": seeded(i)})
    assert max(relative_error(x, y) for x, y in zip(ours, expected, strict=True)) < 2e-6


@pytest.mark.parametrize("count", [1, 4, 8, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_step_of_tcd_equals_diffusers(count, eta):
    theirs = TCDScheduler(**BETAS)
    theirs.set_timesteps(count)
    steps = sampling_steps(TABLE, count, schedule="distilled", final_alpha=final_alpha("tcd", "distilled"))
    assert [step.timestep.item() for step in steps] == theirs.timesteps.tolist()
    ours, asked, _ = run_ours(find_sampler("tcd"), steps, eta=eta)
    noises = lambda i: {"eta": eta, "generator": seeded(i)}  # noqa: E731
    expected = run_theirs(theirs, asked, unscaled=False, step_options=noises)
    assert max(relative_error(x, y) for x, y in zip(ours, expected, strict=True)) < 2e-6


# With linspace, diffusers takes t - 1000 // steps for the next timestep, which is not the one it visits next.
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_ddim_step_equals_diffusers(spacing, eta):
    theirs = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing)
    theirs.set_timesteps(20)
    steps = sampling_steps(TABLE, 20, schedule=spacing, final_alpha="first")
    ours, asked, _ = run_ours(find_sampler("ddim"), steps, eta=eta)
    noises = (lambda i: {"eta": eta, "variance_noise": drawn(i)}) if eta else lambda i: {}
    expected = run_theirs(theirs, asked, unscaled=False, step_options=noises)
    assert max(relative_error(x, y) for x, y in zip(ours, expected, strict=True)) < 2e-6


@pytest.mark.parametrize("count", [10, 1000])
def test_every_ddpm_step_equals_diffusers(count):
    scheduler = DDPMScheduler(**SCHEDULE, timestep_spacing="trailing", variance_type="fixed_small")
    scheduler.set_timesteps(count)
    steps = sampling_steps(TABLE, count, schedule="trailing", final_alpha="one")
    assert [step.timestep.item() for step in steps] == scheduler.timesteps.tolist()
    theirs = noise()()
    for i, step in enumerate(steps):
        # each step starts from the same latents: over 1000 of them, float32 roundings would add up
        ours = last(find_sampler("ddpm")(some_network, theirs, [step], draw_noise=lambda i=i: drawn(i)))
        eps = some_network(theirs, step.alpha_bar)
        theirs = scheduler.step(eps, int(step.timestep), theirs, generator=seeded(i)).prev_sample
        assert relative_error(ours, theirs) < 1e-5
