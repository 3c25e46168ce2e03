"""The networks against diffusers and transformers, with the same weights.

Narrow models here, at several sizes; the full-size ones are marked slow.
"""

import make_checkpoint
import pytest
import torch
from conftest import TINY, fill
from oracles import diffusers_unet, diffusers_vae, relative_error, transformers_text_encoder

from sd.config import SD_V1, SD_V1_EDIT, SD_V1_INPAINTING
from sd.text.tokenizer import Tokenizer

NARROW = 1e-5  # roundings of float32, at most 4e-6 as measured; a wrong constant gives 1e-3 or more
FULL = 1e-4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*prompts):
    return torch.from_numpy(Tokenizer()(prompts))


def unet_error(config, networks, height, width, timestep=801, batch=2):
    theirs = diffusers_unet(config, networks)
    x_t = randn(batch, config.unet.in_channels, height, width)
    context = randn(batch, 77, config.unet.context_width, seed=1)
    timestep = torch.tensor(timestep)
    ours = networks["unet"](x_t, timestep, context)
    return relative_error(ours, theirs(x_t, timestep, context).sample)


def vae_errors(config, networks, height, width, batch=2):
    """Of the mean, the log-variance and the decoded picture."""
    theirs = diffusers_vae(config, networks)
    image = randn(batch, 3, height, width).clamp(-1, 1)
    mean, logvar = networks["vae"].encode(image)
    moments = theirs.encode(image).latent_dist
    pairs = (mean, moments.mean), (logvar, moments.logvar), (networks["vae"].decode(mean), theirs.decode(mean).sample)
    return [relative_error(*pair) for pair in pairs]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (9, 13), (1, 5)])
def test_unet_equals_diffusers_at_even_and_odd_sizes(tiny_networks, height, width):
    assert unet_error(TINY, tiny_networks, height, width) < NARROW


@pytest.mark.parametrize("family", [SD_V1_INPAINTING, SD_V1_EDIT])
def test_unet_with_more_input_channels_equals_diffusers(family):
    config = make_checkpoint.tiny(family)
    assert unet_error(config, fill(config), 8, 8) < NARROW


def test_unet_takes_one_timestep_for_each_picture(tiny_networks):
    assert unet_error(TINY, tiny_networks, 8, 8, timestep=[0, 500, 999], batch=3) < NARROW


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64), (72, 40)])
def test_vae_equals_diffusers(tiny_networks, height, width):
    assert max(vae_errors(TINY, tiny_networks, height, width)) < NARROW


@pytest.mark.parametrize("skip_layers", [0, 1])
def test_text_encoder_equals_transformers(tiny_networks, skip_layers):
    theirs = transformers_text_encoder(TINY, tiny_networks)
    ids = tokens("a photograph of an astronaut riding a horse", "", "word " * 100)
    ours = tiny_networks["text_encoder"](ids, skip_layers=skip_layers)
    hidden = theirs(ids, output_hidden_states=True).hidden_states[-1 - skip_layers]
    final_norm = tiny_networks["text_encoder"].final_norm
    assert relative_error(ours, final_norm(hidden)) < NARROW
    if skip_layers == 0:
        assert relative_error(ours, theirs(ids).last_hidden_state) < NARROW


@pytest.fixture(scope="module")
def full_networks():
    return fill(SD_V1)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 32)])
def test_full_size_unet_equals_diffusers(full_networks, height, width):
    assert unet_error(SD_V1, full_networks, height, width, batch=1) < FULL


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(512, 512), (384, 256)])
def test_full_size_vae_equals_diffusers(full_networks, height, width):
    assert max(vae_errors(SD_V1, full_networks, height, width, batch=1)) < FULL


@pytest.mark.slow
def test_full_size_text_encoder_equals_transformers(full_networks):
    theirs = transformers_text_encoder(SD_V1, full_networks)
    ids = tokens("a photograph of an astronaut riding a horse", "")
    assert relative_error(full_networks["text_encoder"](ids), theirs(ids).last_hidden_state) < FULL
