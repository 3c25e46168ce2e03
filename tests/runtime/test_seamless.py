"""Seamless pictures: shifting the input circularly shifts the output, and changes nothing else."""

import pytest
import torch
from conftest import TINY, refused, settings, settings_of
from PIL import Image
from predictions import relative_error

import sd
from sd.runtime.seamless import pad, seamless

FLOAT_ERROR = 1e-4  # of float32 sums in another order; what is not seamless is off by more than 0.01


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_padding_is_the_opposite_edge():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert pad(x, 1, 1, 0, 0, "x")[0, 0].tolist() == [[2, 0, 1, 2, 0], [5, 3, 4, 5, 3]]
    assert pad(x, 0, 1, 1, 0, "y")[0, 0].tolist() == [[3, 4, 5, 0], [0, 1, 2, 0], [3, 4, 5, 0]]


@pytest.mark.parametrize(("axes", "x", "y"), [("xy", True, True), ("x", True, False), ("y", False, True), ("", 0, 0)])
def test_the_unet_knows_no_edge_along_the_axes(tiny_networks, axes, x, y):
    """By 8 latents: the UNet halves them three times."""
    latents, context = randn(1, 4, 16, 24), randn(1, 77, TINY.unet.context_width)

    def predict(latents):
        with seamless(tiny_networks["unet"], axes):
            return tiny_networks["unet"](latents, torch.tensor(500.0), context)

    plain = predict(latents)
    for shift, dim, expected in ((8, -1, x), (8, -2, y)):
        error = relative_error(predict(latents.roll(shift, dim)).roll(-shift, dim), plain)
        assert error < FLOAT_ERROR if expected else error > 0.01


def test_the_vae_knows_no_edge_either_way(tiny_networks):
    vae = tiny_networks["vae"]
    latents, image = randn(1, 4, 6, 5), randn(1, 3, 48, 40)
    with seamless(vae, "xy"):
        rolled = vae.decode(latents.roll((2, 3), (-2, -1))).roll((-16, -24), (-2, -1))
        assert relative_error(rolled, vae.decode(latents)) < FLOAT_ERROR
        rolled = vae.encode(image.roll((16, 24), (-2, -1)))[0].roll((-2, -3), (-2, -1))
        assert relative_error(rolled, vae.encode(image)[0]) < FLOAT_ERROR
    rolled = vae.decode(latents.roll(2, -1)).roll(-16, -1)
    assert relative_error(rolled, vae.decode(latents)) > 0.01


@pytest.mark.slow
def test_the_axes_are_settings_of_the_picture(run, model, tiny_ckpt):
    common = ["txt2img", "a", "-m", tiny_ckpt, "-s", 1, "--steps", 1, "-W", 64, "-H", 64]
    _, (path,), _ = run(*common, "--tile")
    assert settings_of(path)["tile"] == "xy"
    assert ", Tiling: True, " in Image.open(path).text["parameters"]
    _, (other,), _ = run(*common, "--tile", "x")
    _, (plain,), _ = run(*common)
    assert len({Image.open(each).tobytes() for each in (path, other, plain)}) == 3
    refused(run(*common, "--tile", "z"), "--tile z does not exist. There are: x, xy, y.")
    (picture,) = model.make([settings(steps=1, tile="xy", hires=1.5)])
    assert picture.size == (96, 96)


def test_a_file_in_another_precision_than_the_networks_tiles_too():
    """The embedded model's is fp16, and weights of its UNet's convolutions stay so beside float32."""
    model = sd.load(device="cpu", precision="fp32")
    (picture,) = model.txt2img("a red circle", width=64, height=64, steps=1, seed=1, tile="x")
    (plain,) = model.txt2img("a red circle", width=64, height=64, steps=1, seed=1)
    assert picture.tobytes() != plain.tobytes()
