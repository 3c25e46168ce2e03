"""Pictures of a UNet that predicts the velocity, as those of Stable Diffusion 2 for 768x768: against diffusers."""

import make_checkpoint
import pytest
from conftest import PROMPT, assemble, fill, final, settings
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from oracles import diffusers_pipeline, relative_error

from sd.config import SD_V2
from sd.sampling.noise import PictureNoise

CONFIG = make_checkpoint.tiny(SD_V2)
COMMON = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
PURE_NOISE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NARROW = 1e-4
SAMPLERS = {  # ours -> theirs with the same noise levels
    ("ddim", "leading"): DDIMScheduler(**COMMON, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    ("dpmpp_2m", "trailing"): DPMSolverMultistepScheduler(**COMMON, timestep_spacing="trailing"),
}
FROM_PURE_NOISE = {  # the last number: how near
    "ddim": (DDIMScheduler(**COMMON, **PURE_NOISE, clip_sample=False), 1e-3),  # their last alpha_bar is 0, ours 2**-24
    "dpmpp_2m": (DPMSolverMultistepScheduler(**COMMON, **PURE_NOISE), NARROW),
    "euler": (EulerDiscreteScheduler(**COMMON, **PURE_NOISE), NARROW),
}


@pytest.fixture(scope="module")
def networks():
    return fill(CONFIG)


@pytest.fixture(scope="module")
def theirs(networks):
    pipeline = diffusers_pipeline(CONFIG, networks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def error(networks, theirs, scheduler, steps, rescale=0.0, **options):
    """How far our latents are from diffusers' with the same noise, contexts and guidance."""
    model = assemble(CONFIG, networks)
    context, negative = model.encode_prompts([PROMPT, "blurry"]).split(1)
    theirs.scheduler = scheduler
    expected = theirs(
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        guidance_scale=7.5,
        guidance_rescale=rescale,
        width=64,
        height=64,
        latents=PictureNoise([1], (4, 8, 8))(),
        output_type="latent",
    ).images
    batch = [settings(negative_prompt="blurry", steps=steps, guidance_rescale=rescale, **options)]
    return relative_error(final(model, batch), expected)


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sampler", "schedule"), SAMPLERS)
def test_guided_steps_equal_those_of_diffusers(networks, theirs, sampler, schedule, steps):
    options = {"sampler": sampler, "schedule": schedule}
    assert error(networks, theirs, SAMPLERS[sampler, schedule], steps, **options) < NARROW


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
@pytest.mark.parametrize("sampler", FROM_PURE_NOISE)
def test_steps_from_pure_noise_equal_those_of_diffusers(networks, theirs, sampler, rescale):
    scheduler, near = FROM_PURE_NOISE[sampler]
    options = {"sampler": sampler, "schedule": "trailing", "zero_terminal_snr": True}
    assert error(networks, theirs, scheduler, 5, rescale, **options) < near
