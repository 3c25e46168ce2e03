"""Pictures that keep the depth of another: against diffusers, and by what the UNet is shown."""

import json
from dataclasses import replace

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import assemble, fill, refused, settings, settings_of
from oracles import diffusers_unet, diffusers_vae, relative_error, transformers_text_encoder
from PIL import Image

from sd.config import SD_V1_DEPTH, SD_V2_DEPTH
from sd.pipeline.image.depth_maps import latent_depth
from sd.pipeline.image.tensors import to_tensor
from sd.pipeline.settings import SettingError
from sd.sampling.init_image import InitImage
from sd.sampling.noise import PictureNoise
from sd.text.tokenizer import Tokenizer

CONFIG = make_checkpoint.tiny(SD_V2_DEPTH)


@pytest.fixture(scope="module")
def networks():
    return fill(CONFIG)


@pytest.fixture(scope="module")
def model(networks):
    return assemble(CONFIG, networks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "depth.ckpt"
    make_checkpoint.save_original(path, make_checkpoint.made_up_state_dict(CONFIG))
    return path


@pytest.fixture(scope="module")
def picture():
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((64, 64))


@pytest.fixture(scope="module")
def depth_map():
    """16 bits: a ramp, and a near square."""
    levels = np.add.outer(100 * np.arange(64), 300 * np.arange(64)).astype(np.uint16)
    levels[16:40, 16:40] = 60_000
    return Image.fromarray(levels)


@pytest.fixture
def files(tmp_path, picture, depth_map):
    picture.save(tmp_path / "in.png")
    depth_map.save(tmp_path / "map.png")
    return tmp_path


def last(model, batch, start):
    *_, latents = model.sample(batch, start)
    return latents


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_latents_equal_diffusers(networks, picture, depth_map, strength, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
    from tokenizer_oracles import load_transformers

    tokenizer = load_transformers(tmp_path)
    tokenizer.model_max_length, tokenizer.pad_token = 77, "!"
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    theirs = StableDiffusionDepth2ImgPipeline(
        vae=diffusers_vae(CONFIG, networks),
        text_encoder=transformers_text_encoder(CONFIG, networks),
        tokenizer=tokenizer,
        unet=diffusers_unet(CONFIG, networks),
        scheduler=scheduler,
        depth_estimator=None,
        feature_extractor=None,
    )
    theirs.set_progress_bar_config(disable=True)
    given = torch.from_numpy(np.array(depth_map, dtype=np.float32))[None]
    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    noise = PictureNoise([1], (4, 8, 8))()
    theirs.prepare_latents = lambda image, timestep, *_: scheduler.add_noise(x_0, noise, timestep)
    expected = theirs(
        "a horse",
        image=picture,
        depth_map=given,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=7.5,
        negative_prompt="blurry",
        output_type="latent",
    ).images
    job = settings(prompt="a horse", negative_prompt="blurry", steps=10, strength=strength)
    ours = assemble(CONFIG, networks)
    ours.tokenizer = Tokenizer(pad_token=CONFIG.text_encoder.pad_token)
    found = last(ours, [job], InitImage(latents=x_0, depth=given[None]))
    assert relative_error(found, expected) < 1e-3


def test_the_unet_reads_the_depth_after_the_latents(model, depth_map, picture):
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.depth2img("a cave", picture, depth_map, seed=1, steps=2, size=(64, 64))
    hook.remove()
    expected = latent_depth(torch.from_numpy(np.array(depth_map, dtype=np.float32))[None, None], (8, 8))
    for x in seen:
        assert x.shape[1] == 5
        assert relative_error(x[:, 4:], expected.expand(len(x), -1, -1, -1)) < 1e-5


def test_depth_is_estimated_where_no_map_is_given(model, picture):
    depth = model.estimate_depth(to_tensor(picture))
    assert depth.std() > 0
    with_map = model.depth2img("a cave", picture, np.asarray(depth[0, 0]), seed=1, steps=2, size=(64, 64))
    (plain,) = model.depth2img("a cave", picture, seed=1, steps=2, size=(64, 64))
    difference = np.abs(np.asarray(plain).astype(int) - np.asarray(with_map[0]).astype(int))
    assert difference.mean() < 2  # that map is resized twice
    grey = model.depth(picture)
    assert (grey.mode, grey.size, grey.getextrema()) == ("I;16", (64, 64), (0, 65535))


def test_inverting_a_map_is_giving_the_inverted_one(model, picture, depth_map):
    inverted = Image.fromarray(65535 - np.asarray(depth_map))
    options = {"seed": 1, "steps": 1, "size": (64, 64)}
    first = model.depth2img("a cave", picture, depth_map, invert_depth=True, **options)
    second = model.depth2img("a cave", picture, inverted, **options)
    assert first[0].tobytes() == second[0].tobytes()


def test_a_model_without_a_depth_network_needs_a_map(picture, depth_map):
    config = make_checkpoint.tiny(SD_V1_DEPTH)
    model = assemble(config, fill(config))
    assert model.depth2img("a cave", picture, depth_map, seed=1, steps=1, size=(64, 64))[0].size == (64, 64)
    for use in (lambda: model.depth2img("a cave", picture, steps=1), lambda: model.depth(picture)):
        with pytest.raises(SettingError, match=r"this model \(sd-v1-depth\) has no depth network"):
            use()
    with pytest.raises(SettingError, match="invert_depth is for a depth map of your own"):
        model.depth2img("a cave", picture, invert_depth=True, steps=1)


def test_other_tasks_and_other_models_are_refused(model, picture, depth_map):
    with pytest.raises(ValueError, match="image to image needs a model whose UNet takes 4 channels"):
        model.img2img("a cave", picture, steps=1)
    config = make_checkpoint.tiny(replace(SD_V1_DEPTH, family="sd-v1", unet=replace(SD_V1_DEPTH.unet, in_channels=4)))
    with pytest.raises(ValueError, match="depth to image needs a model whose UNet takes 5 channels"):
        assemble(config, fill(config)).depth2img("a cave", picture, depth_map, steps=1)


@pytest.mark.slow
def test_the_command_stores_what_it_began_with_and_like_makes_the_same_picture(run, checkpoint, files):
    common = ["--init", "in.png", "-m", checkpoint]
    code, (path,), err = run("depth2img", "a cave", *common, "--seed", 3, "--steps", 5, "-W", 64, "-H", 64)
    assert code == 0, err
    assert "running 4 of 5 steps (strength 0.8)" in err
    stored = settings_of(path)
    assert (stored["strength"], stored["init"]["name"], "depth" in stored) == (0.8, "in.png", False)
    code, (mapped,), err = run(
        *("depth2img", "a cave", *common, "--depth", "map.png", "--invert-depth", "--seed", 3, "--steps", 2),
        *("-W", 64, "-H", 64),
    )
    stored = settings_of(mapped)
    assert (stored["depth"]["name"], len(stored["depth"]["sha256"]), stored["invert_depth"]) == ("map.png", 64, True)
    code, (again,), err = run("depth2img", "--like", mapped, *common, "--depth", "map.png", "-o", "again.png")
    assert (code, "could not use" in err) == (0, False)
    assert Image.open(again).tobytes() == Image.open(mapped).tobytes()
    assert "depth:               map.png" in run("show", mapped)[1]
    code, _, err = run("txt2img", "--like", mapped)
    assert "could not use" in err
    assert "depth map.png" in err


@pytest.mark.slow
def test_the_depth_command_writes_a_map_and_a_picture_of_it(run, checkpoint, files):
    code, paths, err = run("depth", "in.png", "-m", checkpoint, "-o", "maps/")
    assert (code, paths) == (0, ["maps/in-depth.png", "maps/in-depth-colours.png"]), err
    grey, colours = map(Image.open, paths)
    assert (grey.mode, grey.size, colours.mode, colours.size) == ("I;16", (64, 64), "RGB", (64, 64))
    refused(run("depth", "in.png", "-m", checkpoint, "-o", "maps/"), "in-depth.png", "exists")
    _, (line,), _ = run("depth", "in.png", "-m", checkpoint, "-o", "other.png", "--json")
    assert (json.loads(line)["event"], json.loads(line)["depth_of"]["name"]) == ("depth", "in.png")
    code, _, err = run(
        *("depth2img", "a cave", "--init", "in.png", "--depth", paths[0], "-m", checkpoint, "--steps", 2)
    )
    assert code == 0, err


REFUSED = {
    "no task of the model": (["img2img", "a cave", "--init", "in.png"], "Use it with sd depth2img."),
    "nothing to invert": (["depth2img", "a cave", "--init", "in.png", "--invert-depth"], "Give one with --depth IMAGE"),
    "another shape": (["depth2img", "a cave", "--init", "in.png", "--depth", "wide.png"], "the depth map is 80x20"),
    "no picture": (["depth2img", "a cave", "--init", "in.png", "--depth", "none.png"], "none.png"),
}


@pytest.mark.parametrize(("command", "problem"), REFUSED.values(), ids=REFUSED)
def test_bad_use_is_refused_before_the_weights_are_read(run, checkpoint, files, command, problem):
    Image.new("L", (80, 20)).save(files / "wide.png")
    refused(run(*command, "-m", checkpoint), problem)


def test_models_without_a_depth_network_are_refused(run, tiny_ckpt, files, tmp_path):
    refused(
        run("depth", "in.png", "-m", tiny_ckpt), "tiny.ckpt has no depth network. Give -m a checkpoint that has one"
    )
    refused(run("depth2img", "a cave", "--init", "in.png", "-m", tiny_ckpt), "needs a checkpoint whose UNet takes 5")
    config = make_checkpoint.tiny(SD_V1_DEPTH)
    make_checkpoint.save_original(tmp_path / "mapped.ckpt", make_checkpoint.made_up_state_dict(config))
    refused(run("depth2img", "a cave", "--init", "in.png", "-m", "mapped.ckpt"), "Give a depth map with --depth IMAGE.")
