"""The tiny VAE against diffusers' own code with the same weights."""

import pytest
import torch
from oracles import relative_error
from tiny_vaes import original, theirs

from convert.layouts.tiny_vae_names import tiny_vae_parameters
from sd.config import TAESD
from sd.networks.tiny_vae import TinyVAE


@pytest.fixture(scope="module")
def tiny_vae():
    network = TinyVAE(TAESD).requires_grad_(False).eval()
    names = {f"{half}.{row.ours}": (half, row.original) for half in HALVES for row in tiny_vae_parameters(TAESD, half)}
    network.load_state_dict({ours: original(half)[name] for ours, (half, name) in names.items()})
    return network


HALVES = ("encoder", "decoder")


def test_it_has_the_published_number_of_parameters(tiny_vae):
    assert sum(parameter.numel() for parameter in tiny_vae.parameters()) == 2_445_063


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 5, 9)])
def test_latents_are_decoded_as_by_diffusers(tiny_vae, shape):
    latents = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))  # beyond what is squeezed
    expected = theirs().decode(latents).sample
    assert (expected.shape, expected.std() > 0.1) == ((shape[0], 3, 8 * shape[2], 8 * shape[3]), True)
    assert relative_error(tiny_vae.decode(latents), expected) < 1e-5


def test_pictures_are_encoded_as_by_diffusers(tiny_vae):
    image = 2 * torch.rand(2, 3, 40, 72, generator=torch.Generator().manual_seed(2)) - 1
    expected = theirs().encode(image).latents
    assert (expected.shape, expected.std() > 0.1) == ((2, 4, 5, 9), True)
    assert relative_error(tiny_vae.encode(image), expected) < 1e-5
