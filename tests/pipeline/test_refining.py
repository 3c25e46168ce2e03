"""A base model of XL and its refiner in a row: against diffusers, and which of them takes which steps."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import assemble, fill, final, rest_slow, settings
from diffusers import StableDiffusionXLImg2ImgPipeline
from oracles import (
    clip_tokenizer,
    diffusers_unet,
    diffusers_vae,
    diffusers_xl_pipeline,
    relative_error,
    transformers_text_encoder,
)
from PIL import Image
from test_xl_pictures import CONFIG, NARROW, REFINER, SAMPLERS

from sd.pipeline.image.tensors import init_image_from
from sd.pipeline.latent_diffusion import table_and_steps
from sd.pipeline.refining import first_refined
from sd.pipeline.runner import NonFiniteError, Runner
from sd.pipeline.settings import SettingError
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.sampling.noise import PictureNoise
from sd.text.tokenizer import Tokenizer

WORDS = {"prompt": "a horse", "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def networks():
    return {config.family: fill(config) for config in (CONFIG, REFINER)}


@pytest.fixture(scope="module")
def pair(networks):
    refiner = assemble(REFINER, networks[REFINER.family])
    refiner.tokenizer = Tokenizer(pad_token=0)
    return replace(assemble(CONFIG, networks[CONFIG.family]), refiner=refiner)


@pytest.fixture(scope="module")
def theirs(networks):
    base, refiner = networks[CONFIG.family], networks[REFINER.family]
    first = diffusers_xl_pipeline(CONFIG, base, None)
    second = StableDiffusionXLImg2ImgPipeline(
        vae=diffusers_vae(REFINER, refiner),
        text_encoder=None,
        text_encoder_2=transformers_text_encoder(REFINER, refiner),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(REFINER.text_encoder),
        unet=diffusers_unet(REFINER, refiner),
        scheduler=None,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "schedule"), rest_slow(SAMPLERS))
@pytest.mark.parametrize("switch", rest_slow([0.8, 0.45]))
def test_the_hand_over_equals_that_of_diffusers(pair, theirs, sampler, schedule, switch):
    """At a size that is not square, with every setting of either model."""
    base, refiner = theirs
    base.scheduler = SAMPLERS[sampler, schedule]
    refiner.scheduler = type(base.scheduler).from_config(base.scheduler.config)
    sizes = {"original_size": (48, 96), "crops_coords_top_left": (8, 16)}
    options = {**WORDS, "num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "latent", **sizes}
    noise = PictureNoise([1], (4, 8, 16))()
    latents = base(**options, prompt_2="oil", width=128, height=64, denoising_end=switch, latents=noise).images
    scores = {"aesthetic_score": 7.0, "negative_aesthetic_score": 3.0}
    theirs_alone = {"target_size": (64, 128), "negative_crops_coords_top_left": (8, 16)}  # as the base has it
    expected = refiner(**options, **scores, **theirs_alone, image=latents, denoising_start=switch).images
    job = settings(
        **WORDS,
        **scores,
        prompt_2="oil",
        original_size="96x48",
        crop="16,8",
        sampler=sampler,
        schedule=schedule,
        steps=10,
        switch_at=switch,
        width=128,
    )
    assert relative_error(final(pair, [job]), expected) < NARROW


@pytest.mark.parametrize(
    ("steps", "options", "first"),
    [
        (10, {"switch_at": 0.8, "schedule": "leading"}, 8),
        (30, {"switch_at": 0.8, "schedule": "karras"}, 19),  # of the time, not of the steps
        (30, {"switch_at": 0.8, "schedule": "karras", "switch_by": "steps"}, 24),
        (30, {}, 30),
    ],
)
def test_the_switch_is_at_a_share_of_the_time_or_of_the_steps(steps, options, first):
    job = settings(**WORDS, steps=steps, sampler="euler", **options)
    assert first_refined(table_and_steps(CONFIG.schedule, job)[1], job) == first


@pytest.mark.parametrize(("share", "idle"), [(0, "the base model"), (1, "the refiner")])
@pytest.mark.parametrize("by", ["time", "steps"])
def test_a_switch_that_leaves_no_step_to_one_of_them_is_refused(pair, share, idle, by):
    with pytest.raises(SettingError, match=f"leaves no step to {idle}"):
        final(pair, [settings(steps=4, switch_at=share, switch_by=by)])


def test_a_switch_needs_a_refiner_and_a_base_of_xl(pair):
    job = settings(steps=4, switch_at=0.5)
    with pytest.raises(SettingError, match="needs a refiner"):
        final(replace(pair, refiner=None), [job])
    with pytest.raises(SettingError, match="must be the refiner of Stable Diffusion XL; this is sdxl"):
        final(replace(pair, refiner=pair), [job])
    with pytest.raises(SettingError, match="goes with a base model of Stable Diffusion XL; this one is sdxl-refiner"):
        final(replace(pair.refiner, refiner=pair.refiner), [job])


class Counting(Runner):
    """Notes how often its UNet runs, by the length of the vector."""

    def __init__(self):
        self.calls = []

    def predictor(self, unet, settings, pictures):
        def predict(x, timestep, context, vector):
            self.calls.append(context)
            return unet(x, timestep, context, vector)

        return predict


@pytest.mark.parametrize(
    ("strength", "masked", "each"),
    [(1.0, False, (8, 2)), (0.5, False, (3, 2)), (0.2, False, (0, 2)), (1.0, True, (8, 2))],
)
def test_image_to_image_and_inpainting_go_on_with_the_refiner(pair, strength, masked, each):
    """At a low strength, the refiner alone runs. The part that a mask keeps stays."""
    picture, mask = Image.linear_gradient("L").resize((64, 64)).convert("RGB"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    counters = Counting(), Counting()
    model = replace(pair, runner=counters[0], refiner=replace(pair.refiner, runner=counters[1]))
    job = settings(**WORDS, steps=10, strength=strength, switch_at=0.8)
    start = init_image_from(picture, mask if masked else None)
    *_, latents = model.sample([job], start)
    assert tuple(len(counter.calls) for counter in counters) == each
    if masked:
        assert torch.allclose(latents[..., 4:], pair.encode_image(start.image)[..., 4:], atol=0.2)


def test_prompts_that_change_and_noise_on_the_way_go_on_through_the_switch(pair):
    counter = Counting()
    job = settings(prompt="a [cat:dog:9]", negative_prompt="", steps=10, switch_at=0.8, sampler="euler_a")
    model = replace(pair, refiner=replace(pair.refiner, runner=counter))
    latents = final(model, [job])
    before, after = counter.calls
    assert not torch.equal(before[1], after[1])
    again = final(model, [replace(job, seed_delta=1)])
    assert not torch.equal(latents, again)


def test_a_refiner_that_fails_is_named_by_its_network(pair):
    """So that a retry in higher precision is of the right one."""
    refiner = replace(pair.refiner, runner=Broken())
    with pytest.raises(NonFiniteError) as problem:
        final(replace(pair, refiner=refiner), [settings(**WORDS, steps=4, switch_at=0.5)])
    assert problem.value.network is refiner.unet


class Broken(Runner):
    def predictor(self, unet, settings, pictures):
        return lambda x, *_: x * torch.nan


def test_low_memory_has_one_network_on_the_device_at_a_time(pair):
    visiting, most = [], []

    class Noted(Execution):
        @contextmanager
        def at_work(self, network):
            visiting.append(network)
            most.append(len(set(visiting)))
            with super().at_work(network):
                yield
            visiting.remove(network)

    runners = (Noted(RunOptions(low_memory=True), torch.device("cpu")) for _ in range(2))
    first, second = runners
    model = replace(pair, runner=first, refiner=replace(pair.refiner, runner=second))
    model.make([settings(**WORDS, steps=4, switch_at=0.5)])
    assert set(most) == {1}
