"""Pictures of networks distilled for a few steps: against diffusers, with the same weights and noise."""

from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import PROMPT, assemble, fill, final, settings
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from oracles import diffusers_pipeline, diffusers_xl_pipeline, relative_error

from sd.config import SD_V1, SDXL
from sd.pipeline.embedded_guidance import guidance_embedding
from sd.pipeline.runner import Runner
from sd.pipeline.settings import SettingError
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.sampling.noise import PictureNoise

SHAPE = (4, 8, 8)
NARROW = 1e-4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY = {config.family: make_checkpoint.tiny(config) for config in (SD_V1, SDXL)}
LCM = {name: replace(config, unet=replace(config.unet, guidance_width=32)) for name, config in TINY.items()}


@pytest.fixture(scope="module")
def networks():
    """A narrow latent consistency model of each family."""
    return {name: fill(config) for name, config in LCM.items()}


@pytest.fixture
def same_noise(monkeypatch):
    """Has a scheduler of diffusers draw the noise that follows ours; returns that which both begin with."""

    def draw(module):
        noise = PictureNoise([1], SHAPE)
        first = noise()
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: noise())
        return first

    return draw


def consistency_pipeline(config, networks):
    """Theirs, with the scheduler of such models."""
    if config.unet.vector_width:
        return diffusers_xl_pipeline(config, networks, LCMScheduler(**BETAS))
    components = diffusers_pipeline(config, networks).components
    return LatentConsistencyModelPipeline(
        **{**components, "scheduler": LCMScheduler(**BETAS)}, requires_safety_checker=False
    )


@pytest.mark.parametrize("family", LCM)
@pytest.mark.parametrize(("guidance_scale", "steps"), [(8.0, 4), pytest.param(1.5, 2, marks=pytest.mark.slow)])
def test_latent_consistency_models_take_the_guidance_scale_as_diffusers_has_it(
    networks, same_noise, family, guidance_scale, steps
):
    config = LCM[family]
    pipeline = consistency_pipeline(config, networks[family])
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "width": 64, "height": 64}
    begin = same_noise("scheduling_lcm")
    expected = pipeline(PROMPT, latents=begin, output_type="latent", **options).images
    model = assemble(config, networks[family])
    batch = [settings(sampler="lcm", steps=steps, guidance_scale=guidance_scale, negative_prompt="blurry")]
    assert relative_error(final(model, batch), expected) < NARROW
    other = [replace(batch[0], guidance_scale=guidance_scale + 1)]
    assert relative_error(final(model, other), expected) > 10 * NARROW


@pytest.mark.parametrize("width", [32, 256])
def test_the_guidance_scale_is_embedded_as_in_diffusers(width):
    theirs = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, torch.tensor([7.0]), width)
    assert torch.allclose(guidance_embedding(8.0, width), theirs, rtol=0, atol=1e-6)  # of angles up to 7000
    assert torch.equal(guidance_embedding(1.0, width)[0], torch.arange(width) >= width // 2)


class Asked(Runner):
    """Notes how many rows the UNet predicts at once."""

    def predictor(self, unet, settings, pictures):
        def predict(x, *given, **named):
            self.rows = len(x)
            return unet(x, *given, **named)

        return predict


@pytest.mark.parametrize("family", LCM)
def test_there_is_one_prediction_for_each_picture_however_it_is_run(networks, family):
    asked, batch = Asked(), [settings(seed=seed, sampler="lcm", steps=2) for seed in (1, 2)]
    model = assemble(LCM[family], networks[family])
    plain = final(replace(model, runner=asked), batch)
    assert asked.rows == 2
    for runner in (Execution(), Execution(RunOptions(low_memory=True))):
        assert relative_error(final(replace(model, runner=runner), batch), plain) < 1e-5


def test_longer_negative_prompts_do_not_count(networks):
    model = assemble(LCM["sd-v1"], networks["sd-v1"])
    plain, long = settings(sampler="lcm", steps=1), settings(sampler="lcm", steps=1, negative_prompt="a b " * 50)
    assert model.chunk_count(long) == 1
    assert torch.equal(final(model, [plain]), final(model, [long]))


@pytest.mark.parametrize("options", [{"guidance_rescale": 0.5}, {"guidance_interval": (0.3, 5)}])
def test_settings_of_guidance_between_two_predictions_are_refused(networks, options):
    with pytest.raises(SettingError, match="takes the guidance scale as an input") as refusal:
        final(assemble(LCM["sd-v1"], networks["sd-v1"]), [settings(**options)])
    assert refusal.value.name in options
