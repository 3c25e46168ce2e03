"""Pictures of Stable Diffusion XL: against diffusers, and what its UNet is given."""

from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import PROMPT, assemble, fill, final, rest_slow, settings
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from oracles import diffusers_xl_pipeline, relative_error
from PIL import Image

from sd.config import SDXL, SDXL_INPAINTING, SDXL_REFINER
from sd.networks.unet import UNet
from sd.pipeline.image.tensors import init_image_from
from sd.pipeline.runner import Runner
from sd.pipeline.settings import SettingError
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.sampling.noise import PictureNoise
from sd.text.tokenizer import Tokenizer

CONFIG = make_checkpoint.tiny(SDXL)
REFINER, INPAINTING = (make_checkpoint.tiny(family) for family in (SDXL_REFINER, SDXL_INPAINTING))
COMMON = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NARROW = 1e-4
SAMPLERS = {  # ours -> theirs with the same noise levels
    ("ddim", "leading"): DDIMScheduler(**COMMON, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    ("dpmpp_2m", "trailing"): DPMSolverMultistepScheduler(**COMMON, timestep_spacing="trailing"),
    ("euler", "leading"): EulerDiscreteScheduler(**COMMON, timestep_spacing="leading", steps_offset=1),
}


@pytest.fixture(scope="module")
def networks():
    return fill(CONFIG)


@pytest.fixture(scope="module")
def xl(networks):
    return assemble(CONFIG, networks)


@pytest.fixture(scope="module")
def refiner():
    model = assemble(REFINER, fill(REFINER))
    model.tokenizer = Tokenizer(pad_token=0)
    return model


@pytest.fixture(scope="module")
def theirs(networks):
    pipeline = diffusers_xl_pipeline(CONFIG, networks, None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("sampler", "schedule"), rest_slow(SAMPLERS))
@pytest.mark.parametrize("negative", rest_slow(["", "blurry"]))
def test_guided_steps_equal_those_of_diffusers(xl, theirs, sampler, schedule, negative):
    """From the words on, at a size that is not square; without a negative prompt, both take zeros for it."""
    theirs.scheduler = SAMPLERS[sampler, schedule]
    expected = theirs(
        PROMPT,
        negative_prompt=negative or None,
        num_inference_steps=10,
        guidance_scale=7.5,
        width=128,
        height=64,
        latents=PictureNoise([1], (4, 8, 16))(),
        output_type="latent",
    ).images
    options = {"sampler": sampler, "schedule": schedule, "negative_prompt": negative, "width": 128}
    assert relative_error(final(xl, [settings(steps=10, **options)]), expected) < NARROW


@pytest.mark.parametrize("options", [{"low_memory": True}, {}], ids=["low memory", "plain"])
def test_however_the_networks_are_run_the_latents_are_the_same(xl, networks, options):
    batch = [settings(seed=seed, prompt=prompt, steps=2) for seed, prompt in ((1, "a cat"), (2, "a dog"))]
    plain = final(replace(xl, runner=Runner()), batch)
    other = final(replace(xl, runner=Execution(RunOptions(**options))), batch)
    assert relative_error(other, plain) < 1e-5
    alone = final(xl, batch[:1])  # no picture changes another
    assert relative_error(alone, plain[:1]) < 1e-5


def test_the_context_is_that_of_both_encoders_and_weights_change_one_at_a_time(xl):
    context, pooled = xl.encode_texts(["a (red:1.5) cat", "a red cat", "(a red cat)"])
    assert (context.shape, pooled.shape) == ((3, 77, 128), (3, 64))
    assert torch.equal(pooled[0], pooled[1])  # without weights
    assert torch.equal(pooled[0], pooled[2])
    for half in context.split(64, dim=-1):
        weighted, plain, _ = half
        assert weighted.mean().isclose(plain.mean())  # restored in each encoder's own
        assert (weighted[2] / weighted[1]).allclose(1.5 * plain[2] / plain[1], rtol=1e-3)


def test_the_second_encoder_reads_rows_padded_with_zeros(xl):
    ids = torch.from_numpy(Tokenizer(pad_token=0)(["a cat"]))
    context, pooled = xl.text_encoder_2.encode(ids)
    ours, our_pooled = xl.encode_texts(["a cat"])
    assert torch.allclose(ours[..., 64:], context)
    assert torch.allclose(our_pooled, pooled)


def test_the_vector_is_that_of_the_first_chunk(xl):
    two, one = xl.encode_texts(["a cat BREAK a dog"]), xl.encode_texts(["a cat"], chunks=2)
    assert two[0].shape == one[0].shape == (1, 154, 128)
    assert torch.equal(two[1], one[1])
    assert not torch.equal(two[0], one[0])


def test_clip_skip_counts_as_in_the_web_ui(xl):
    """At 1 and 2 it is what XL was trained with; the vector is always that of the last layer."""
    first, second, third = (xl.encode_texts(["a cat"], clip_skip=number) for number in (1, 2, 3))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(second[0], third[0])
    assert torch.equal(first[1], third[1])
    with pytest.raises(SettingError, match="out of range"):
        xl.encode_texts(["a cat"], clip_skip=4)


class Asked(Runner):
    """Notes the vectors that the UNet is given."""

    def __init__(self):
        self.vectors = []

    def predictor(self, unet, settings, pictures):
        def predict(x, timestep, context, vector):
            self.vectors.append((context, vector))
            return UNet.forward(unet, x, timestep, context, vector)

        return predict


def test_an_empty_negative_prompt_is_zeros_in_the_base_and_words_in_the_refiner(xl, refiner):
    for model, zeros in ((xl, True), (refiner, False)):
        asked = Asked()
        final(replace(model, runner=asked), [settings(negative_prompt="", steps=1)])
        context, vector = asked.vectors[0]
        assert (not context[0].any()) == zeros
        assert (not vector[0, :64].any()) == zeros
        assert context[1].any()
        assert torch.equal(vector[0, 64:], vector[1, 64:]) == zeros  # the refiner's scores differ


def test_a_prompt_that_changes_brings_its_own_vector(xl):
    asked = Asked()
    final(replace(xl, runner=asked), [settings(prompt="a [cat:dog:1]", negative_prompt="x", steps=2)])
    first, second = (vector for _, vector in asked.vectors)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_equals_that_of_diffusers(xl, theirs, strength, monkeypatch):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pipeline = StableDiffusionXLImg2ImgPipeline(**theirs.components, add_watermarker=False)
    pipeline.scheduler = SAMPLERS["ddim", "leading"]
    pipeline.set_progress_bar_config(disable=True)
    noise = PictureNoise([1], (4, 8, 8))()
    module = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    expected = pipeline(
        "a horse",
        image=picture,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=7.5,
        negative_prompt="blurry",
        original_size=(64, 64),
        target_size=(64, 64),
        output_type="latent",
    ).images
    job = settings(prompt="a horse", negative_prompt="blurry", steps=10, strength=strength)
    *_, latents = xl.sample([job], init_image_from(picture, None))
    assert relative_error(latents, expected) < NARROW


@pytest.mark.slow
def test_inpainting_with_nine_channels_equals_that_of_diffusers(monkeypatch):
    networks = fill(INPAINTING)
    components = diffusers_xl_pipeline(INPAINTING, networks, SAMPLERS["ddim", "leading"]).components
    pipeline = StableDiffusionXLInpaintPipeline(**components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    picture, mask = Image.linear_gradient("L").resize((64, 64)).convert("RGB"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    expected = pipeline(
        "a horse",
        image=picture,
        mask_image=mask,
        strength=1.0,
        num_inference_steps=10,
        guidance_scale=7.5,
        negative_prompt="blurry",
        width=64,
        height=64,
        latents=PictureNoise([1], (4, 8, 8))(),
        output_type="latent",
    ).images
    job = settings(prompt="a horse", negative_prompt="blurry", steps=10, strength=1.0)
    *_, latents = assemble(INPAINTING, networks).sample([job], init_image_from(picture, mask))
    assert relative_error(latents, expected) < NARROW


OTHERS = {  # a setting -> the models that do not read it
    ("prompt_2", "x"): ("model", "refiner"),
    ("negative_prompt_2", "x"): ("model", "refiner"),
    ("original_size", (8, 8)): ("model",),
    ("crop", (8, 8)): ("model",),
    ("aesthetic_score", 3.0): ("model", "xl"),
    ("negative_aesthetic_score", 3.0): ("model", "xl"),
}


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_a_setting_that_the_model_does_not_read_is_refused(request, name, value):
    for which in OTHERS[name, value]:
        with pytest.raises(SettingError, match=f"{name} does nothing here"):
            request.getfixturevalue(which).txt2img("a cat", steps=1, width=64, height=64, **{name: value})
