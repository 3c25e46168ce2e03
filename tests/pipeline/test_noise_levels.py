"""Pictures of Stable Diffusion XL trained at other noise levels, or to predict something else: against diffusers."""

import math
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import PROMPT, assemble, fill, final, settings
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from oracles import diffusers_xl_pipeline, relative_error

from sd.config import SDXL
from sd.networks.vae import scaled, unscaled
from sd.sampling.continuous import log_uniform, told_log_sigma
from sd.sampling.denoiser import EPS_FROM
from sd.sampling.noise import PictureNoise
from sd.sampling.schedule import alpha_bar_of, alphas_cumprod, sigma_of, timestep_at

NARROW = 1e-4
CONFIG = make_checkpoint.tiny(SDXL)
COMMON = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}
PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
CONTINUOUS = COMMON | {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}
LEVELS = {  # kind, prediction and noise levels of the model, our sampler and schedule, and theirs
    "playground euler": ("edm", PLAYGROUND, "euler", "karras", EDMEulerScheduler(**PLAYGROUND)),
    "playground dpm++": ("edm", PLAYGROUND, "dpmpp_2m", "karras", EDMDPMSolverMultistepScheduler(**PLAYGROUND)),
    "edm v": ("v", PLAYGROUND, "euler", "karras", EDMEulerScheduler(**PLAYGROUND, **V)),
    "cosxl": ("v", COSXL, "euler", "exponential", EDMEulerScheduler(**COSXL, **V, sigma_schedule="exponential")),
    "cosxl karras": ("v", COSXL, "euler", "karras",
                     EulerDiscreteScheduler(**CONTINUOUS, sigma_min=0.002, sigma_max=120.0)),
    "v": ("v", {}, "euler", "leading",
          EulerDiscreteScheduler(**COMMON, **V, timestep_spacing="leading", steps_offset=1)),
    "zero-SNR v": ("v", {}, "euler", "trailing",
                   EulerDiscreteScheduler(**COMMON, **V, timestep_spacing="trailing", rescale_betas_zero_snr=True)),
    "x0": ("x0", {}, "euler", "leading", EulerDiscreteScheduler(**COMMON, prediction_type="sample",
                                                               timestep_spacing="leading", steps_offset=1)),
}  # fmt: skip


def config_with(prediction, levels):
    return replace(CONFIG, prediction=prediction, schedule=replace(CONFIG.schedule, **levels))


@pytest.fixture(scope="module")
def networks():
    return fill(CONFIG)


@pytest.fixture(scope="module")
def theirs(networks):
    pipeline = diffusers_xl_pipeline(CONFIG, networks, None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def beginning(scheduler, steps, sigma_data):
    """Our first noise, so that theirs begins at the same x_T: ours has the variance of latents and noise together."""
    scheduler.set_timesteps(steps)
    deviation = math.sqrt(sigma_data**2 + scheduler.sigmas[0].item() ** 2)
    return PictureNoise([1], (4, 8, 8))() * (deviation / float(scheduler.init_noise_sigma))


QUICK = ("playground euler", "cosxl", "turbo", "turbo in 4 steps", "one-step lightning")


def kinds(table):
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in table]


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(LEVELS))
def test_ten_guided_steps_equal_those_of_diffusers(networks, theirs, kind):
    prediction, levels, sampler, schedule, theirs.scheduler = LEVELS[kind]
    sigma_data = levels.get("sigma_data", 1.0)
    expected = theirs(
        PROMPT,
        negative_prompt="blurry",
        num_inference_steps=10,
        guidance_scale=3.0,
        width=64,
        height=64,
        latents=beginning(theirs.scheduler, 10, sigma_data),
        output_type="latent",
    ).images
    options = {"sampler": sampler, "schedule": schedule, "negative_prompt": "blurry", "guidance_scale": 3.0}
    job = settings(steps=10, **options, zero_terminal_snr=kind.startswith("zero"))
    ours = final(assemble(config_with(prediction, levels), networks), [job])
    assert relative_error(ours, expected / sigma_data) < NARROW  # ours are in units of sigma_data


FEW = {  # steps, prediction, sampler, and theirs, all from trailing timesteps and without guidance
    "turbo": (1, "eps", "euler_a", EulerAncestralDiscreteScheduler),
    "turbo in 4 steps": (4, "eps", "euler_a", EulerAncestralDiscreteScheduler),
    "lightning in 2 steps": (2, "eps", "euler", EulerDiscreteScheduler),
    "lightning in 8 steps": (8, "eps", "euler", EulerDiscreteScheduler),
    "one-step lightning": (1, "x0", "euler", EulerDiscreteScheduler),
}


@pytest.mark.parametrize("kind", kinds(FEW))
def test_few_steps_without_guidance_equal_those_of_diffusers(networks, theirs, monkeypatch, kind):
    steps, prediction, sampler, scheduler = FEW[kind]
    named = {"x0": "sample", "eps": "epsilon"}[prediction]
    theirs.scheduler = scheduler(**COMMON, timestep_spacing="trailing", prediction_type=named)
    noise = PictureNoise([1], (4, 8, 8))
    begin = beginning(theirs.scheduler, steps, 1.0)
    noise()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *_, **__: noise()
    )
    expected = theirs(
        PROMPT, num_inference_steps=steps, guidance_scale=0.0, width=64, height=64, latents=begin, output_type="latent"
    ).images
    job = settings(steps=steps, sampler=sampler, schedule="trailing", guidance_scale=1.0)
    assert relative_error(final(assemble(config_with(prediction, {}), networks), [job]), expected) < NARROW


def test_a_unet_without_timesteps_is_told_a_quarter_of_the_logarithm_of_sigma():
    config = replace(CONFIG.schedule, **PLAYGROUND)
    told = told_log_sigma(lambda x, timestep: timestep, config)
    table = log_uniform(config)
    sigmas = torch.tensor([80.0, 1.0, 0.3, 0.002], dtype=torch.float64)
    places = timestep_at(table, alpha_bar_of(sigmas / 0.5))
    assert told(None, places) == pytest.approx((sigmas.log() / 4).tolist(), abs=1e-6)
    assert alphas_cumprod(config).dtype == torch.float64
    assert sigma_of(table)[[0, -1]].tolist() == pytest.approx([0.004, 160.0])


@pytest.mark.parametrize("prediction", EPS_FROM)
def test_every_prediction_leads_to_the_noise(prediction):
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.tensor(0.3, dtype=torch.float64)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
    output = {"eps": eps, "v": v, "edm": -v, "x0": x_0}[prediction]
    assert torch.allclose(EPS_FROM[prediction](output, x_t, alpha_bar), eps, atol=1e-5)


def test_edm_is_the_denoiser_of_karras_et_al():
    """Eq. 7 with table 1: D = c_skip x + c_out F, in units of sigma_data."""
    x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, sigma_data = 1.7, 0.5
    total = sigma**2 + sigma_data**2
    denoised = sigma_data**2 / total * x + sigma * sigma_data / math.sqrt(total) * output
    alpha_bar = alpha_bar_of(torch.tensor(sigma / sigma_data, dtype=torch.float64))
    eps = EPS_FROM["edm"](output, x / sigma_data * alpha_bar.sqrt(), alpha_bar)
    assert torch.allclose(eps, (x - denoised) / sigma)


def test_latents_are_standardised_by_channel_and_back():
    """As diffusers does with the means and deviations of a folder, where the scale is 0.5 and sigma_data, too."""
    means, deviations = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
    config = replace(CONFIG.vae, latent_scale=1.0, latent_means=means, latent_deviations=deviations)
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (means, deviations))
    theirs = (latents - mean) * 0.5 / deviation
    assert torch.allclose(scaled(latents, config), theirs / 0.5, atol=1e-6)
    assert torch.allclose(unscaled(scaled(latents, config), config), latents, atol=1e-5)
    assert torch.equal(unscaled(latents, CONFIG.vae), latents / 0.13025)
