"""Mistakes in the VAE that raise no error; test_parity compares its numbers with diffusers."""

import pytest
import torch
from conftest import TINY

from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.networks.vae import Downsample, sample_latents


def test_every_norm_has_the_small_eps():
    network = build_networks(SD_V1)["vae"]
    assert {module.eps for module in network.modules() if isinstance(module, torch.nn.GroupNorm)} == {1e-6}


def test_downsample_pads_right_and_bottom_only():
    downsample = Downsample(1)
    downsample.load_state_dict({"conv.weight": torch.ones(1, 1, 3, 3), "conv.bias": torch.zeros(1)})
    # sums over windows that start at (0, 0), (0, 2), ... of a 4x4 picture of ones: 9, or 6 and 4 at the padded edges
    assert downsample(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]


def test_one_latent_stands_for_eight_by_eight_pixels(tiny_networks):
    assert TINY.vae.factor == 8
    mean, logvar = tiny_networks["vae"].encode(torch.zeros(1, 3, 24, 40))
    assert mean.shape == logvar.shape == (1, 4, 3, 5)
    assert tiny_networks["vae"].decode(mean).shape == (1, 3, 24, 40)


def test_log_variance_is_kept_where_its_exponential_is_finite(tiny_networks):
    vae = build_networks(TINY)["vae"]
    state = dict(tiny_networks["vae"].state_dict())
    state["quant_conv.bias"] = torch.tensor([0.0, 0, 0, 0, 1000, -1000, 0, 0])
    vae.load_state_dict(state, assign=True)
    _, logvar = vae.encode(torch.zeros(1, 3, 8, 8))
    assert logvar[0, 0].item() == 20
    assert logvar[0, 1].item() == -30


def test_sampled_latents_have_the_given_mean_and_spread():
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    drawn = sample_latents(torch.tensor(3.0), torch.tensor(2.0).log() * 2, noise)  # log-variance of deviation 2
    assert drawn.mean().item() == pytest.approx(3, abs=0.02)
    assert drawn.std().item() == pytest.approx(2, abs=0.02)
