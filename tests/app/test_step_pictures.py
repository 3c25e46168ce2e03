"""The picture at each step: what is predicted, how it is shown, and where it goes."""

import os

import pytest
import torch
from conftest import TINY, refused, settings
from PIL import Image

from sd.pipeline.image.tensors import to_images
from sd.pipeline.step_previews import fit_colours, quick_image, step_pictures
from sd.sampling.schedule import add_noise, alphas_cumprod

SMALL = ["-W", "64", "-H", "64", "-s", "1"]


def test_the_last_clean_latents_are_where_a_run_without_noise_at_its_end_ends(model):
    clean = []
    *_, latents = model.sample([settings(sampler="euler", steps=3)], on_clean=clean.append)
    assert len(clean) == 3
    assert (clean[-1] - latents).norm() < 1e-5 * latents.norm()  # Euler's last step goes all the way to x_0


def test_clean_latents_and_the_noise_of_a_step_make_what_it_began_with(model):
    """DDIM: x_t of the next step is the predicted x_0 with the predicted noise at the next level. By hand for one."""
    clean = []
    first, *_ = model.sample([settings(steps=4, guidance_scale=1.0)], on_clean=clean.append)
    table = alphas_cumprod(TINY.schedule)
    start, after = table[751].double(), table[501].double()  # four steps of the leading schedule: 751, 501, 251, 1
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))[None]
    eps = (noise - start.sqrt() * clean[0]) / (1 - start).sqrt()
    assert (add_noise(clean[0], eps, after) - first).norm() < 1e-5 * first.norm()


def test_a_linear_decoder_is_found_exactly():
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(4, 8, 6, generator=generator)
    weights = torch.rand(5, 3, generator=generator).double() * 0.4 - 0.2
    (picture,) = to_images(quick_image(latents, weights))
    found = fit_colours(latents, picture.resize((48, 64), Image.Resampling.NEAREST))
    assert torch.allclose(found, weights, atol=0.02)  # the picture has 8 bits: steps of 0.008


def test_decoded_steps_end_with_the_picture(model):
    clean = []
    (picture,) = model.make([settings(sampler="euler", steps=2)], clean=clean)
    latents = [each[0] for each in clean]
    decoded = step_pictures(model, latents, picture, "vae")
    assert max(abs(a - b) for a, b in zip(decoded[-1].tobytes(), picture.tobytes(), strict=True)) <= 1
    assert [each.size for each in step_pictures(model, latents, picture, "fast")] == [(64, 64)] * 2


def test_steps_are_numbered_files_beside_the_picture(run, tiny_ckpt, tmp_path):
    command = ["txt2img", "a", "-m", tiny_ckpt, *SMALL, "--steps", 3, "--save-steps", "-o", "x/a.png"]
    assert run(*command)[:2] == (0, ["x/a.png"])
    assert sorted(os.listdir("x")) == ["a-step001.png", "a-step002.png", "a-step003.png", "a.png"]
    os.remove("x/a.png")
    refused(run(*command), "a-step001.png exists already", "--force")


@pytest.mark.parametrize(("form", "name"), [("webp", "a-steps.webp"), ("apng", "a-steps.png")])
def test_steps_are_an_animation_that_ends_with_the_picture(run, tiny_ckpt, form, name):
    command = ["txt2img", "a", "-m", tiny_ckpt, *SMALL, "--steps", 3, "--save-steps", "fast", "--save-steps-as", form]
    assert run(*command, "-o", "a.png")[0] == 0
    with Image.open(name) as moving:
        # the three steps and the picture; WebP's encoder makes one frame of two that nobody can tell apart
        assert moving.n_frames == 4 if form == "apng" else 1 < moving.n_frames <= 4
        assert (moving.size, moving.info["loop"]) == ((64, 64), 0)
    assert sorted(os.listdir()) == ["a-steps.png" if form == "apng" else "a-steps.webp", "a.png"]
