"""Pictures from pictures: where a run begins, what a mask keeps, and what an inpainting network is shown."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, assemble, fill, final, pixels, refused, settings, settings_of
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from oracles import relative_error
from PIL import Image
from reference import Gaussian

from sd.config import SD_V1_INPAINTING
from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.image.tensors import init_image_from, to_tensor
from sd.pipeline.second_pass import steps_for, steps_run
from sd.sampling.init_image import InitImage, keep_unmasked, with_channels
from sd.sampling.noise import PictureNoise
from sd.sampling.samplers import SAMPLERS, find_sampler
from sd.sampling.schedule import alphas_cumprod, sampling_steps

TABLE = alphas_cumprod(TINY.schedule)


@pytest.fixture(scope="module")
def picture():
    """A blue square on a red gradient."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0] = np.arange(64) * 4
    image[16:40, 16:40] = (0, 0, 255)
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def mask():
    """The left half is repainted."""
    levels = np.zeros((64, 64), np.uint8)
    levels[:, :32] = 255
    return Image.fromarray(levels)


@pytest.mark.parametrize(("steps", "strength", "run"), [(30, 0.75, 22), (100, 0.29, 29), (50, 0, 0), (20, 1, 20)])
def test_as_many_steps_are_run_as_in_the_original(steps, strength, run):
    assert steps_run(steps, strength) == run


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.7, 0.999, 1.0])
def test_exact_steps_take_the_shortest_schedule_that_has_them(strength):
    for wanted in (1, 7, 30):
        steps = steps_for(wanted, strength)
        assert steps_run(steps, strength) == wanted
        assert steps_run(steps - 1, strength) < wanted


def test_pictures_and_masks_become_tensors_in_their_ranges():
    image = to_tensor(Image.new("RGB", (3, 2), (255, 0, 51)))
    assert image.shape == (1, 3, 2, 3)
    assert image[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6])
    assert to_tensor(Image.new("L", (3, 2), 51)).unique().item() == pytest.approx(0.2)


def test_strength_0_gives_the_reconstruction_of_the_vae(model, picture):
    start = init_image_from(picture, None)
    (made,) = model.make([settings(strength=0.0)], start)
    expected = model.vae.decode(model.vae.encode(to_tensor(picture))[0])
    assert np.abs(pixels(made) - ((expected[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1


def test_strength_1_gives_the_picture_of_text_alone(model, picture):
    assert torch.equal(final(model, [settings()]), last(model, [settings()], init_image_from(picture, None)))


def last(model, batch, start):
    *_, latents = model.sample(batch, start)
    return latents


def test_as_many_latents_are_yielded_as_steps_are_run(model, picture):
    start = init_image_from(picture, None)
    for strength, run in ((0.5, 5), (0.79, 7), (0.0, 1)):
        assert len(list(model.sample([settings(steps=10, strength=strength)], start))) == run


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_equals_that_of_diffusers(model, theirs, picture, strength, monkeypatch):
    pipeline = StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = PictureNoise([1], (4, 8, 8))()
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    expected = pipeline(
        "a horse",
        image=picture,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=7.5,
        negative_prompt="blurry",
        output_type="latent",
    ).images
    job = settings(prompt="a horse", negative_prompt="blurry", steps=10, strength=strength)
    assert relative_error(last(model, [job], init_image_from(picture, None)), expected) < 1e-3


def test_pictures_from_pictures_are_the_same_alone_and_in_a_batch(model, picture, mask):
    for start in (init_image_from(picture, None), init_image_from(picture, mask)):
        jobs = [settings(seed=seed, strength=0.6, sampler="euler_a") for seed in (1, 2, 3)]
        together = last(model, jobs, start)
        for row, job in zip(together, jobs, strict=True):
            assert relative_error(last(model, [job], start)[0], row) < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_ends_where_it_was_with_every_sampler(sampler):
    """The network is one of Gaussian data; the left half of the latents is kept."""
    data = Gaussian(mean=0.7, deviation=0.4)
    x_0 = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., 2:] = 1
    predict = keep_unmasked(lambda x, bar: data.eps(x, bar), x_0, mask)
    fresh = PictureNoise([5], (4, 4, 4))
    steps = sampling_steps(TABLE, 12, schedule="trailing", final_alpha="one")
    *_, made = find_sampler(sampler)(predict, fresh().double(), steps, draw_noise=lambda: fresh().double())
    assert torch.allclose(made[..., :2], x_0[..., :2], atol=1e-6)
    assert not torch.allclose(made[..., 2:], x_0[..., 2:], atol=0.1)


def test_on_the_way_what_is_kept_is_as_noisy_as_the_rest():
    """DDIM adds no noise of its own: after each step, the kept part is x_0 with the noise that it began with."""
    x_0, noise = (torch.randn(1, 4, 4, 4, dtype=torch.float64) for _ in range(2))
    steps = sampling_steps(TABLE, 9)
    predict = keep_unmasked(lambda x, bar: torch.zeros_like(x), x_0, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    x = steps[0].alpha_bar.sqrt() * x_0 + (1 - steps[0].alpha_bar).sqrt() * noise
    for step, made in zip(steps, find_sampler("ddim")(predict, x, steps), strict=True):
        expected = step.alpha_bar_prev.sqrt() * x_0 + (1 - step.alpha_bar_prev).sqrt() * noise
        assert torch.allclose(made, expected, atol=1e-9)


def test_where_the_mask_is_black_not_a_bit_changes(model, picture, mask):
    for inputs in (InputSettings(mask_blur=0), InputSettings(mask_blur=3), InputSettings(only_masked=True)):
        (made,) = model.inpaint("a cat", picture, mask, inputs=inputs, seed=1, steps=2, size=(64, 64))
        kept = slice(32, None) if not inputs.mask_blur else slice(50, None)
        assert np.array_equal(np.asarray(made)[:, kept], np.asarray(picture)[:, kept])
        assert not np.array_equal(np.asarray(made)[:, :28], np.asarray(picture)[:, :28])


def test_a_picture_grows_and_its_old_part_stays(model, picture):
    inputs = InputSettings(expand=Expansion(left=16, bottom=8), overlap=8)
    native = replace(model, config=replace(model.config, native_size=64))
    (made,) = native.inpaint("a cat", picture, None, inputs=inputs, seed=1, steps=2)
    assert made.size == (80, 72)
    old = np.asarray(made)[: 64 - 9, 16 + 9 :]
    assert np.array_equal(old, np.asarray(picture)[: 64 - 9, 9:])


def test_pictures_that_python_opened_are_read_as_those_of_the_commands(model, picture):
    """Upright, and of 16 bits: a camera's picture lies on its side, and 65535 is white."""
    exif = Image.Exif()
    exif[0x112] = 6
    turned = picture.crop((0, 0, 64, 32)).rotate(90, expand=True)  # shown turned to the right again
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    levels = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    options = {"strength": 0.0, "seed": 1, "steps": 2}
    for given, meant in ((Image.open(file), picture.crop((0, 0, 64, 32))), (levels, picture.convert("L"))):
        before = given.tobytes()
        (made,), (expected,) = (model.img2img("a", each, size=(64, 64), **options) for each in (given, meant))
        assert np.array_equal(pixels(made), pixels(expected))
        assert given.tobytes() == before
    with pytest.raises(ValueError, match="the picture has 32 bits a pixel, and nothing says which number is white"):
        model.img2img("a", Image.new("F", (64, 64)), **options)


def test_an_odd_picture_keeps_its_size(model, picture):
    (made,) = model.img2img("a cat", picture.crop((0, 0, 61, 58)), strength=0.5, seed=1, steps=2, size=(64, 64))
    assert made.size == (64, 64)
    native = replace(model.config, native_size=64)
    (made,) = replace(model, config=native).img2img("a cat", picture.crop((0, 0, 61, 58)), seed=1, steps=2)
    assert made.size == (61, 58)


def test_a_unet_reads_further_channels_after_those_of_the_noisy_latents():
    seen = []
    channels = torch.cat([torch.ones(1, 1, 2, 2), torch.full((1, 4, 2, 2), 2.0)], dim=1)
    unet = with_channels(lambda *inputs: seen.append(inputs) or inputs[0][:, :4], channels)
    unet(torch.zeros(3, 4, 2, 2), "timestep", "context")
    ((x, timestep, context),) = seen
    assert x[:, :, 0, 0].tolist() == [[0] * 4 + [1] + [2] * 4] * 3
    assert (timestep, context) == ("timestep", "context")


def test_an_inpainting_checkpoint_repaints_and_sees_what_is_kept(picture, mask):
    config = replace(SD_V1_INPAINTING, **{part: getattr(TINY, part) for part in ("text_encoder", "vae")})
    config = replace(config, unet=replace(TINY.unet, in_channels=9))
    model = assemble(config, fill(config))
    (made,) = model.inpaint("a cat", picture, mask, inputs=InputSettings(mask_blur=0), seed=1, steps=2, size=(64, 64))
    assert np.array_equal(np.asarray(made)[:, 32:], np.asarray(picture)[:, 32:])
    other = picture.copy()
    other.paste((0, 255, 0), (40, 0, 64, 64))  # in the kept part
    latents = [last(model, [settings()], init_image_from(each, mask))[..., :4] for each in (picture, other)]
    assert relative_error(*latents) > 1e-4
    hidden = picture.copy()
    hidden.paste((0, 255, 0), (0, 0, 16, 64))  # in the repainted part, which the network must not see
    latents = [last(model, [settings()], init_image_from(each, mask))[..., :4] for each in (picture, hidden)]
    assert torch.equal(*latents)


def test_a_model_of_other_channels_is_refused(picture):
    config = replace(TINY, family="sd-v1-inpainting", unet=replace(TINY.unet, in_channels=9))
    with pytest.raises(ValueError, match="image to image needs a model whose UNet takes 4 channels"):
        last(assemble(config, fill(TINY)), [settings()], InitImage(image=to_tensor(picture)))


@pytest.fixture
def files(tmp_path, picture, mask):
    picture.save(tmp_path / "in.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.mark.slow
def test_the_commands_tell_what_they_run_and_store_what_they_began_with(run, tiny_ckpt, files):
    common = ["--init", "in.png", "-m", tiny_ckpt, "--seed", 3, "-W", 64, "-H", 64]
    code, (path,), err = run("img2img", "a cat", *common, "--steps", 4)
    assert code == 0
    assert "running 3 of 4 steps (strength 0.75)" in err
    stored = settings_of(path)
    assert (stored["strength"], stored["init"]["name"], len(stored["init"]["sha256"])) == (0.75, "in.png", 64)
    assert "Denoising strength: 0.75, Resize mode: Crop and resize" in Image.open(path).text["parameters"]
    _, (path,), err = run("img2img", "a cat", *common, "--steps", 3, "--exact-steps")
    assert "running 3 of 4 steps" in err

    code, (path,), err = run("inpaint", "a cat", *common, "--mask", "mask.png", "--steps", 2, "--mask-blur", 0)
    assert code == 0
    assert settings_of(path)["mask"]["name"] == "mask.png"
    assert "Mask blur: 0" in Image.open(path).text["parameters"]
    assert np.array_equal(np.asarray(Image.open(path))[:, 32:], np.asarray(Image.open(files / "in.png"))[:, 32:])
    common = ["--init", "in.png", "-m", tiny_ckpt, "--seed", 3, "--only-masked", "-W", 64, "-H", 64, "--steps", 1]
    code, (path,), err = run("inpaint", "a cat", *common, "--expand", "left=64")
    assert (code, Image.open(path).size) == (0, (128, 64))


@pytest.mark.slow
def test_what_is_done_with_transparent_parts_is_told_once(run, tiny_ckpt, files):
    hole = Image.open(files / "in.png").convert("RGBA")
    hole.paste((0, 0, 0, 0), (0, 0, 32, 64))
    hole.save(files / "hole.png")
    common = ["-m", tiny_ckpt, "--steps", 2, "-W", 64, "-H", 64]
    code, (path,), err = run("inpaint", "a cat", *common, "--init", "hole.png", "--mask", "hole.png", "--mask-blur", 0)
    assert code == 0
    assert err.count("hole.png: the mask is a picture with a transparent part, and that part is repainted\n") == 1
    assert np.array_equal(np.asarray(Image.open(path))[:, 32:], np.asarray(Image.open(files / "in.png"))[:, 32:])
    code, _, err = run("img2img", "a cat", *common, "--init", "hole.png")
    assert (code, err.count("hole.png: transparent parts are laid on white\n")) == (0, 1)
    Image.fromarray(np.full((64, 64), 100, np.uint8)).save(files / "grey.png")
    code, _, err = run("inpaint", "a cat", *common, "--init", "in.png", "--mask", "grey.png")
    assert (code, "grey.png: its brightest level is 100 of 255, so at most 39 %" in err) == (0, True)


@pytest.mark.parametrize(
    ("command", "flags", "parts"),
    [
        ("img2img", ["--init", "absent.png"], ["absent.png does not exist. Give a picture file."]),
        ("img2img", ["--init", "mask.txt"], ["is not a picture that is read here"]),
        ("img2img", [], ["--init"]),
        ("img2img", ["--init", "in.png", "--strength", "1.5"], ["--strength 1.5 is out of range: 0"]),
        ("img2img", ["--init", "in.png", "-W", "64"], ["--width and --height go together here."]),
        ("img2img", ["--init", "in.png", "--exact-steps", "--strength", "0"], ["--exact-steps needs --strength above"]),
        ("img2img", ["--init", "in.png", "--exact-steps", "--strength", "0.01"], ["a schedule of 3000 steps"]),
        (
            "img2img",
            ["--init", "in.png", "--max-megapixels", "0.001"],
            ["has 64x64 pixels; at most 0.001 million"],
        ),
        ("img2img", ["--init", "in.png", "--max-megapixels", "0"], ["--max-megapixels 0 is out of range: above 0."]),
        ("img2img", ["--init", "in.png", "--max-megapixels", "nan"], ["--max-megapixels nan is out of range"]),
        ("inpaint", ["--init", "in.png"], ["give either --mask IMAGE"]),
        ("inpaint", ["--init", "hole.png"], ["hole.png has a transparent part: --mask hole.png repaints that."]),
        (
            "inpaint",
            ["--init", "in.png", "--mask", "labels.png"],
            ["brightest level is 1 of 255", "-threshold 1"],
        ),
        ("inpaint", ["--init", "in.png", "--expand", "left=5"], ["left=5 is not a multiple of 8. Nearest: 0 or 8."]),
        ("inpaint", ["--init", "in.png", "--mask", "wide.png"], ["the mask is 64x16 and the picture 64x64."]),
        ("inpaint", ["--init", "in.png", "--mask", "black.png"], ["the mask is black everywhere"]),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(run, tiny_ckpt, files, command, flags, parts):
    (files / "mask.txt").write_text("no picture")
    Image.new("L", (64, 16), 255).save(files / "wide.png")
    Image.new("L", (64, 64), 0).save(files / "black.png")
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(files / "labels.png")
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(files / "hole.png")
    refused(run(command, "a", *flags, "-m", tiny_ckpt), *parts)


@pytest.mark.parametrize(
    ("prompt", "strength", "expected"),  # at 10 steps: as many steps of each word
    [
        ("[cat:dog:0.5]", 0.6, {"cat": 5, "dog": 1}),
        ("[cat:dog:0.2]", 0.6, {"cat": 2, "dog": 4}),
        ("[cat:dog:3]", 0.6, {"cat": 3, "dog": 3}),
        ("[cat:dog:0.5]", 0.3, {"cat": 3}),
        ("[cat:dog:0.5]", 1.0, {"cat": 5, "dog": 5}),
        ("[cat|dog]", 0.5, {"cat": 3, "dog": 2}),
    ],
)
def test_words_change_by_the_steps_that_run(model, prompt, strength, expected):
    """As in the web UI: a share is of all steps, and they count from the first that runs."""
    seen, words = [], {word: model.encode_prompts([word]) for word in expected}
    hook = model.unet.register_forward_pre_hook(lambda *given: seen.append(given[-1]["context"]), with_kwargs=True)
    try:
        job = settings(prompt=prompt, steps=10, strength=strength, guidance_scale=1.0, sampler="euler")
        list(model.sample([job], InitImage(latents=torch.zeros(1, 4, 8, 8))))
    finally:
        hook.remove()
    found = [next(word for word, context in words.items() if torch.equal(each, context)) for each in seen]
    assert {word: found.count(word) for word in words} == expected
    assert found[0] == "cat"
