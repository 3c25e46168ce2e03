"""A VAE of another family is told by the colours of its decoder, which is built here to be exactly linear."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, assemble, fill
from oracles import relative_error

from sd.config import SD_V1, SD_V2, SDXL, SDXL_REFINER, TAESD
from sd.networks.tiny_vae import TinyVAE
from sd.networks.vae import VAE
from sd.pipeline.step_previews import fit_colours
from sd.runtime.vae_trial import AMPLITUDE, COLOURS, tiny_vae_warning, trial_latents, vae_warning

V1, XL = COLOURS
OTHER_V1 = (  # fitted to pictures of version 1.4 by others, for their previews
    *((0.298, 0.207, 0.208), (0.187, 0.286, 0.173)),
    *((-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)),
)


def signed(width):
    """Which latent each channel holds, and its sign: both signs in every group, so that a norm keeps its mean, 0."""
    size = width // 32
    return [((channel // size) % 4, 1 if channel % size < size // 2 else -1) for channel in range(width)]


def linear_decoder(rows, config=SD_V1.vae):
    """A VAE whose decoder gives latents these colours: silu(x) - silu(-x) = x, and all residual blocks add nothing."""
    vae = VAE(config).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.zero_()
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.fill_(1)
        if name.endswith("skip") and isinstance(module, torch.nn.Conv2d):
            inside = signed(module.in_channels)
            for channel, wanted in enumerate(signed(module.out_channels)):
                module.weight[channel, inside.index(wanted)] = 1
        if name.endswith("resample.conv") and "decoder" in name:
            module.weight[:, :, 1, 1] = torch.eye(module.in_channels)
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(4)
    decoder = vae.decoder
    for channel, (latent, sign) in enumerate(signed(decoder.conv_in.out_channels)):
        decoder.conv_in.weight[channel, latent, 1, 1] = sign
    channels = signed(decoder.conv_out.in_channels)
    for channel, (latent, sign) in enumerate(channels):
        share = AMPLITUDE * sign / sum(each == (latent, 1) for each in channels)  # the norm makes the latents' size 1
        decoder.conv_out.weight[:, channel, 1, 1] = share * torch.tensor(rows[latent])
    return vae


def linear_tiny_vae(rows):
    """The same for a tiny one: relu(x) - relu(-x) = x."""
    vae = TinyVAE(TAESD).requires_grad_(False)
    for name, parameter in vae.decoder.named_parameters():
        parameter.zero_()
        if name.endswith("conv.weight"):
            parameter[:, :, 1, 1] = torch.eye(TAESD.width)
    for latent, row in enumerate(torch.tensor(rows)):
        for channel, sign in ((2 * latent, 1), (2 * latent + 1, -1)):
            vae.decoder.conv_in.weight[channel, latent, 1, 1] = sign
            vae.decoder.conv_out.weight[:, channel, 1, 1] = sign * row / 2
    vae.decoder.conv_out.bias.fill_(0.5)
    return vae


NARROW = {"width": 64, "multipliers": (1, 1, 1, 1), "residuals_per_level": 1}
FLAT = {"multipliers": (1, 1, 1, 1), "residuals_per_level": 1}


@pytest.mark.parametrize(
    ("family", "sizes", "rows", "advice"),
    [
        (SD_V1, FLAT, COLOURS[V1], None),
        (SD_V1, FLAT, OTHER_V1, None),
        (SD_V1, FLAT, COLOURS[XL], "Give taesd_decoder, which is for Stable Diffusion 1 and 2."),
        (SDXL, FLAT, COLOURS[V1], "Give taesdxl_decoder, which is for Stable Diffusion XL."),
        (SD_V1, NARROW, COLOURS[XL], "Leave out --tiny-vae: the model has a VAE of its own kind."),
    ],
)
def test_a_tiny_vae_for_another_vae_is_named(family, sizes, rows, advice):
    vae = replace(family.vae, **sizes)
    decoder = linear_decoder(COLOURS[XL if family is SDXL else V1], vae)
    model = assemble(replace(TINY, family=family.family, vae=vae), {**fill(TINY), "vae": decoder})
    model.tiny_vae = linear_tiny_vae(rows)
    said = "its colours are not those of the model's VAE, so it was made for another one; pictures will look wrong. "
    assert tiny_vae_warning(model) == (advice and said + advice)


def model_with(rows, family, scale=None):
    vae = replace(SD_V1.vae, latent_scale=scale or family.vae.latent_scale)
    config = replace(
        TINY, family=family.family, vae=vae, unet=replace(TINY.unet, vector_width=family.unet.vector_width)
    )
    return assemble(config, {**fill(TINY), "vae": linear_decoder(rows)})


@pytest.mark.slow
def test_the_decoder_built_here_is_the_map_that_it_is_made_of():
    model = model_with(COLOURS[XL], SDXL)
    (picture,) = model.decode(trial_latents())
    assert relative_error(fit_colours(trial_latents()[0], picture)[:-1], torch.tensor(COLOURS[XL])) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "family", "wrong"),
    [
        (COLOURS[XL], SDXL, None),
        (COLOURS[V1], SDXL, "this VAE is one of Stable Diffusion 1 and 2, and colours will be wrong. Give one of"),
        pytest.param(OTHER_V1, SDXL_REFINER, "this VAE is one of Stable Diffusion 1 and 2", marks=pytest.mark.slow),
        pytest.param(OTHER_V1, SD_V2, None, marks=pytest.mark.slow),
        pytest.param(COLOURS[XL], SD_V1, "this VAE is one of Stable Diffusion XL", marks=pytest.mark.slow),
    ],
)
def test_a_vae_of_another_family_is_named(rows, family, wrong):
    said = vae_warning(model_with(rows, family))
    assert said is None if wrong is None else said.startswith(wrong)


@pytest.mark.parametrize(("scale", "means"), [(0.13025, ()), (0.18215, ()), (1.0, (1.0,) * 4)])
def test_a_scale_of_another_family_is_said_and_a_narrow_vae_is_not_tried(scale, means, monkeypatch):
    """A narrow one was trained by somebody for latents of their own; Playground's latents have means and deviations."""
    vae = replace(TINY.vae, latent_scale=scale, latent_means=means, latent_deviations=means)
    config = replace(TINY, family="sdxl", vae=vae)
    model = assemble(config, fill(TINY))
    monkeypatch.setattr(type(model), "decode", None)
    wrong = "its latents have the scale 0.18215, those of Stable Diffusion XL 0.13025: colours may be off."
    assert vae_warning(model) == (wrong if scale == 0.18215 else None)


@pytest.mark.slow
def test_a_decoder_that_overflows_tells_nothing():
    model = model_with(COLOURS[V1], SDXL)
    model.vae.decoder.conv_in.weight.mul_(float("inf"))
    assert vae_warning(model) is None
