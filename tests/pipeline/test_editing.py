"""Editing by instruction: guidance with two conditions, and the picture that the network reads."""

from dataclasses import replace

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import assemble, fill, pixels, settings
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from oracles import diffusers_unet, diffusers_vae, relative_error, transformers_text_encoder
from PIL import Image

from sd.config import SD_V1_EDIT
from sd.pipeline.image.parameters import parameters_of
from sd.pipeline.image.stored_settings.web_ui import settings_in
from sd.pipeline.image.tensors import init_image_from, to_tensor
from sd.pipeline.runner import Runner
from sd.pipeline.settings import SettingError
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.sampling.denoiser import Denoiser
from sd.sampling.init_image import with_picture
from sd.sampling.noise import PictureNoise
from sd.sampling.schedule import alphas_cumprod

TINY = make_checkpoint.tiny(SD_V1_EDIT)
TABLE = alphas_cumprod(TINY.schedule)
BAR = TABLE[500].double()
FAST = {"seed": 1, "steps": 2, "size": (64, 64)}


@pytest.fixture(scope="module")
def networks():
    return fill(TINY)


@pytest.fixture(scope="module")
def editor(networks):
    return assemble(TINY, networks)


@pytest.fixture(scope="module")
def picture():
    """A blue square on a red gradient."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0] = np.arange(64) * 4
    image[16:40, 16:40] = (0, 0, 255)
    return Image.fromarray(image)


def edited(model, job, picture):
    *_, latents = model.sample([job], init_image_from(picture, None))
    return latents


@pytest.mark.parametrize(("scale", "image_guidance"), [(7.5, 1.5), pytest.param(3.0, 2.5, marks=pytest.mark.slow)])
def test_latents_equal_those_of_diffusers(editor, networks, theirs, picture, scale, image_guidance):
    parts = {"unet": diffusers_unet(TINY, networks), "vae": diffusers_vae(TINY, networks)}
    parts |= {"text_encoder": transformers_text_encoder(TINY, networks)}
    parts |= {"scheduler": DDIMScheduler.from_config(theirs.scheduler.config), "image_encoder": None}
    parts = {**theirs.components, **parts}
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": scale, "image_guidance": image_guidance}
    expected = pipeline(
        "make it snow",
        image=picture,
        num_inference_steps=10,
        guidance_scale=scale,
        image_guidance_scale=image_guidance,
        negative_prompt="blurry",
        latents=PictureNoise([1], (4, 8, 8))(),
        output_type="latent",
    ).images
    job = settings(prompt="make it snow", negative_prompt="blurry", steps=10, **options)
    assert relative_error(edited(editor, job, picture), expected) < 1e-3
    assert relative_error(edited(editor, replace(job, image_guidance=1.0), picture), expected) > 1e-2


class Network:
    """Predicts 100 for the words of a prompt, plus what it sees of the picture; notes its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, timestep, context):
        self.calls.append(x)
        return 100 * context[:, :1, :1, None] + x[:, 4:]


@pytest.mark.parametrize(
    ("scale", "image_guidance", "expected", "predictions"),
    [
        (7.5, 1.5, 0 + 1.5 * (10 - 0) + 7.5 * (110 - 10), 3),  # Brooks et al. (2023), eq. 3, by hand
        (7.5, 1.0, 10 + 7.5 * (110 - 10), 2),  # the prediction without the picture has no part in it
        (1.0, 1.5, 1.5 * 10 + 110 - 10, 3),
        (1.0, 1.0, 110, 1),
        (0.0, 0.0, 0, 3),
    ],
)
def test_guidance_is_that_of_the_paper(scale, image_guidance, expected, predictions):
    network = Network()
    words, none = (torch.full((2, 77, 8), value) for value in (1.0, 0.0))
    unet = with_picture(network, torch.full((1, 4, 8, 8), 10.0), 2)
    options = {"guidance_scale": scale, "image_guidance": image_guidance}
    denoiser = Denoiser(unet, "eps", TABLE, words, none, **options)
    assert denoiser(torch.ones(2, 4, 8, 8), BAR).unique().tolist() == [expected]
    ((x,),) = [network.calls]
    seen = x[:, 4, 0, 0].tolist()
    assert seen == [0, 0, 10, 10, 10, 10] if predictions == 3 else [10] * 2 * predictions
    outside = Denoiser(unet, "eps", TABLE, words, none, **options, guidance_interval=(100, 200))
    assert outside(torch.ones(2, 4, 8, 8), BAR).unique().tolist() == [110]  # as the model predicts
    assert len(network.calls[-1]) == 2


def test_guidance_by_the_picture_alone_needs_a_negative_context_too():
    with pytest.raises(ValueError, match="guidance needs a negative context"):
        Denoiser(Network(), "eps", TABLE, torch.ones(1, 77, 8), None, 1.0, image_guidance=1.5)


def test_the_network_sees_unscaled_latents_of_the_picture(editor, picture):
    seen = []
    handle = editor.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    edited(editor, settings(steps=1, image_guidance=1.5), picture)
    handle.remove()
    mode = editor.vae.encode(to_tensor(picture))[0]
    (x,) = seen
    assert torch.equal(x[0, 4:], torch.zeros_like(mode[0]))
    assert all(torch.allclose(row, mode[0], rtol=1e-5, atol=1e-6) for row in x[1:, 4:])
    assert torch.equal(x[0, :4], PictureNoise([1], (4, 8, 8))()[0])  # pure noise


@pytest.mark.parametrize("options", [{"low_memory": True}, {"low_memory": True, "tiled_vae": True}], ids=str)
@pytest.mark.parametrize("image_guidance", [1.0, 1.5])
def test_with_less_memory_predictions_come_one_after_the_other(editor, picture, options, image_guidance):
    low = replace(editor, runner=Execution(RunOptions(**options)))
    rows = []
    handle = editor.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    job = settings(steps=1, image_guidance=image_guidance)
    made = [edited(model, job, picture) for model in (editor, low)]
    handle.remove()
    predictions = 3 if image_guidance != 1 else 2
    assert rows == [predictions] + [1] * predictions
    assert relative_error(*made) < 1e-4


def test_a_batch_and_the_plain_runner_make_the_same_pictures(editor, picture):
    jobs = [settings(seed=seed, steps=2, sampler="euler_a", image_guidance=1.5) for seed in (1, 2)]
    *_, together = editor.sample(jobs, init_image_from(picture, None))
    plain = replace(editor, runner=Runner())
    for row, job in zip(together, jobs, strict=True):
        assert relative_error(edited(plain, job, picture)[0], row) < 1e-5


def test_in_half_precision_a_picture_does_not_depend_on_its_batch(picture):
    model = assemble(TINY, {name: network.bfloat16() for name, network in fill(TINY).items()})
    jobs = [settings(seed=seed, steps=2, image_guidance=1.5) for seed in (1, 2)]
    *_, together = model.sample(jobs, init_image_from(picture, None))
    assert all(torch.equal(edited(model, job, picture)[0], row) for row, job in zip(together, jobs, strict=True))


def test_from_python_a_picture_is_edited_at_its_own_size(editor, picture):
    native = replace(editor, config=replace(TINY, native_size=64))
    (made,) = native.edit("make it snow", picture.crop((0, 0, 61, 58)), seed=1, steps=2)
    assert made.size == (61, 58)
    (more,) = native.edit("make it snow", picture.crop((0, 0, 61, 58)), seed=1, steps=2, image_guidance=3)
    assert (pixels(made) != pixels(more)).any()
    assert "CFG scale: 7.5, Image CFG scale: 1.5, Seed: 1" in made.info["parameters"]


def test_what_does_not_go_with_a_model_is_refused(editor, model, picture):
    with pytest.raises(ValueError, match=r"editing needs .* takes 8 channels, this one \(sd-v1\) takes 4"):
        model.edit("make it snow", picture, **FAST)
    with pytest.raises(SettingError, match=r"image_guidance must be a number for editing, such as 1\.5"):
        editor.edit("make it snow", picture, image_guidance=None, **FAST)
    with pytest.raises(ValueError, match=r"image to image needs .* takes 4 channels, this one \(sd-v1-edit\) takes 8"):
        editor.img2img("a cat", picture, **FAST)
    with pytest.raises(ValueError, match=r"text to picture needs .* takes 4 channels"):
        editor.txt2img("a cat", seed=1, steps=2, width=64, height=64)
    for start in (None, init_image_from(picture, Image.new("L", (64, 64), 255))):
        with pytest.raises(ValueError, match="editing a picture as a whole; give a picture and no mask"):
            next(editor.sample([settings(image_guidance=1.5)], start))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image_guidance": -0.1}, "image_guidance -0.1 is out of range: 0 to 1000."),
        ({"image_guidance": float("nan")}, "image_guidance nan is out of range"),
        ({"image_guidance": "much"}, "image_guidance cannot be 'much'"),
        ({"image_guidance": 1.5, "strength": 0.5}, "strength 0.5 does nothing: editing begins at pure noise."),
        ({"image_guidance": 1.5, "hires": 2}, "hires 2 works only without an input image."),
        ({"image_guidance": 1.0, "guidance_scale": 1, "guidance_rescale": 0.5}, "guidance_rescale 0.5 does nothing"),
    ],
)
def test_invalid_settings_are_refused(options, problem):
    with pytest.raises(SettingError) as caught:
        settings(**options)
    assert str(caught.value).startswith(problem)


def test_with_either_scale_the_negative_prompt_counts():
    scales = [(7.5, None), (1, None), (1, 1), (1, 1.5), (7.5, 1)]
    guided = [settings(guidance_scale=scale, image_guidance=image).guided for scale, image in scales]
    assert guided == [True, False, False, True, True]


def test_the_web_uis_name_for_it_is_written_and_read():
    text = parameters_of(settings(image_guidance=1.25), "tiny", None)
    assert "CFG scale: 7.5, Image CFG scale: 1.25, Seed: 1" in text
    assert settings_in(text).settings["image_guidance"] == 1.25
    assert "Image CFG" not in parameters_of(settings(), "tiny", None)
