"""DDIM and DDPM against closed forms, against each other, and against diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from reference import Gaussian

from sd.config import SD_V1
from sd.noise import PictureNoise
from sd.samplers.ddim import ddim, ddim_noise_scale, ddim_step
from sd.samplers.ddpm import ddpm, ddpm_posterior
from sd.schedule import alphas_cumprod, sampling_steps

TABLE = alphas_cumprod(SD_V1.schedule)
DATA = Gaussian(mean=0.7, deviation=0.4)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def best_eps(data):
    return lambda x, timestep: data.eps(x, TABLE[timestep].double())


def last(latents):
    *_, final = latents
    return final


def some_network(x, timestep):
    """Some smooth function of x and t, as nonlinear as a network is."""
    return torch.sin(3 * x + timestep / 100) + 0.3 * x


def noise(seed=0):
    return PictureNoise([seed, seed + 1], (4, 8, 8))


def test_ddim_is_exact_where_the_data_is_a_single_point():
    point = Gaussian(mean=0.7, deviation=0.0)
    x = noise()().double()
    steps = sampling_steps(TABLE, 7)
    for step, x_t in zip(steps, ddim(best_eps(point), x, steps), strict=True):
        expected = point.flow(x, steps[0].alpha_bar, step.alpha_bar_prev)
        assert torch.allclose(x_t, expected, atol=1e-12)


def test_ddim_approaches_the_probability_flow_with_order_one():
    x = noise()().double()
    errors = []
    for count in (25, 50, 100, 200):
        steps = sampling_steps(TABLE, count, spacing="trailing")
        exact = DATA.flow(x, steps[0].alpha_bar, steps[-1].alpha_bar_prev)
        errors.append((last(ddim(best_eps(DATA), x, steps)) - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.15)


def run_moments(sampler, steps, data, **options):
    """Mean and variance of what a sampler gives, exactly: its steps are affine in x and in each noise."""

    def final(start, noises):
        draws = iter(noises)
        x = torch.tensor(start, dtype=torch.float64)
        return last(sampler(best_eps(data), x, steps, draw_noise=lambda: next(draws, torch.tensor(0.0)), **options))

    zero = [torch.tensor(0.0, dtype=torch.float64)] * len(steps)
    mean = final(0.0, zero)
    variance = (final(1.0, zero) - mean) ** 2
    for i in range(len(steps)):
        draws = [*zero[:i], torch.tensor(1.0, dtype=torch.float64), *zero[i + 1 :]]
        variance += (final(0.0, draws) - mean) ** 2
    return mean.item(), variance.item()


def gaussian_ddpm_moments(steps, data):
    """The same for DDPM, written down from the posterior q(x_(t-1) | x_t, x_0) with the expected x_0 put in."""
    mean, variance = 0.0, 1.0
    for _, bar, previous in steps:
        bar, previous = bar.item(), previous.item()
        alpha = bar / previous
        spread = bar * data.deviation**2 + 1 - bar
        # E[x_0 | x_t] = slope * x_t + shift
        slope = bar**0.5 * data.deviation**2 / spread
        shift = data.mean * (1 - bar) / spread
        on_x_0 = previous**0.5 * (1 - alpha) / (1 - bar)
        on_x_t = alpha**0.5 * (1 - previous) / (1 - bar)
        mean = (on_x_0 * slope + on_x_t) * mean + on_x_0 * shift
        variance = (on_x_0 * slope + on_x_t) ** 2 * variance + (1 - alpha) * (1 - previous) / (1 - bar)
    return mean, variance


@pytest.mark.parametrize(("count", "spacing"), [(5, "leading"), (20, "trailing"), (50, "linspace")])
def test_ddpm_gives_exactly_the_moments_of_its_posterior(count, spacing):
    steps = sampling_steps(TABLE, count, spacing=spacing, final_alpha="one")
    assert run_moments(ddpm, steps, DATA) == pytest.approx(gaussian_ddpm_moments(steps, DATA), rel=1e-6)


def test_ddpm_with_all_steps_gives_the_data_back():
    steps = sampling_steps(TABLE, 1000, final_alpha="one")
    mean, variance = gaussian_ddpm_moments(steps, DATA)
    assert mean == pytest.approx(DATA.mean, abs=0.02)
    assert variance**0.5 == pytest.approx(DATA.deviation, abs=0.02)
    drawn = last(ddpm(best_eps(DATA), noise()(), steps, draw_noise=noise(5)))
    assert drawn.mean().item() == pytest.approx(mean, abs=0.05)
    assert drawn.std().item() == pytest.approx(variance**0.5, abs=0.03)


@pytest.mark.parametrize("count", [4, 25])
def test_ddim_with_eta_one_is_the_ddpm_posterior(count):
    x, eps = noise(1)().double(), noise(3)().double()
    for _, bar, previous in sampling_steps(TABLE, count):
        sigma = ddim_noise_scale(bar, previous, 1.0)
        mean, variance = ddpm_posterior(x, eps, bar, previous)
        assert torch.allclose(ddim_step(x, eps, bar, previous, sigma), mean, atol=1e-12)
        assert sigma.item() ** 2 == pytest.approx(variance.item(), rel=1e-9)


def test_whole_runs_of_ddim_with_eta_one_and_ddpm_agree():
    steps = sampling_steps(TABLE, 20, spacing="trailing", final_alpha="one")
    ours = last(ddim(some_network, noise()(), steps, eta=1.0, draw_noise=noise(7)))
    theirs = last(ddpm(some_network, noise()(), steps, draw_noise=noise(7)))
    assert torch.allclose(ours, theirs, atol=2e-4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# With linspace, diffusers takes t - 1000 // steps for the next timestep, which is not the one it visits next.
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_ddim_step_equals_that_of_diffusers(spacing, eta):
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    steps = sampling_steps(TABLE, 20, spacing=spacing, final_alpha="first")
    theirs = noise()()
    drawn = []

    def draw():
        drawn.append(torch.randn(2, 4, 8, 8, generator=seeded(len(drawn))))
        return drawn[-1]

    for step, ours in zip(steps, ddim(some_network, theirs, steps, eta=eta, draw_noise=draw), strict=True):
        eps = some_network(theirs, step.timestep)
        fresh = drawn[-1] if eta else None
        theirs = scheduler.step(eps, step.timestep, theirs, eta=eta, variance_noise=fresh).prev_sample
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert len(drawn) == (20 if eta else 0)


@pytest.mark.parametrize("count", [10, 1000])
def test_every_ddpm_step_equals_that_of_diffusers(count):
    scheduler = DDPMScheduler(**SCHEDULE, timestep_spacing="trailing", variance_type="fixed_small")
    scheduler.set_timesteps(count)
    steps = sampling_steps(TABLE, count, spacing="trailing", final_alpha="one")
    assert [step.timestep.item() for step in steps] == scheduler.timesteps.tolist()
    theirs = noise()()
    for i, step in enumerate(steps):
        # each step starts from the same latents: over 1000 of them, float32 roundings would add up
        noise_of_step = torch.randn(2, 4, 8, 8, generator=seeded(i))
        ours = last(ddpm(some_network, theirs, [step], draw_noise=lambda fresh=noise_of_step: fresh))
        eps = some_network(theirs, step.timestep)
        theirs = scheduler.step(eps, step.timestep, theirs, generator=seeded(i)).prev_sample
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be 0 to 1"):
        last(ddim(some_network, noise()(), sampling_steps(TABLE, 3), eta=eta, draw_noise=noise()))


def test_eta_without_a_source_of_noise_is_refused():
    with pytest.raises(ValueError, match="give draw_noise"):
        last(ddim(some_network, noise()(), sampling_steps(TABLE, 3), eta=0.5))


def test_samplers_do_not_change_what_they_are_given():
    x = noise()()
    kept = x.clone()
    steps = sampling_steps(TABLE, 3)
    last(ddim(some_network, x, steps))
    last(ddpm(some_network, x, steps, draw_noise=noise()))
    assert torch.equal(x, kept)
