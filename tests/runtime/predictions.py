"""What tests of patched networks have in common: a network, inputs of a prediction, and how far two are apart."""

from dataclasses import replace
from functools import cache

import torch
from conftest import TINY

from sd.networks.build import build_networks


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def is_patched(network):
    return any("forward" in vars(module) for module in network.modules())


def unet_with_attention_at(*depths):
    """A narrow UNet with so many transformer blocks at each level, and random weights."""
    unet = build_networks(replace(TINY, unet=replace(TINY.unet, depths=depths)))["unet"].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for weight in unet.parameters():
        weight.normal_(0, 0.05, generator=generator)
    return unet


@cache
def words(rows, context_width):
    return torch.randn(rows, 77, context_width, generator=torch.Generator().manual_seed(0))


def guided_inputs(number=0, rows=2, height=8, width=9, context_width=TINY.unet.context_width):
    """Of the number-th prediction of a run: the same words each time, other latents and another timestep.

    The second half of the latents is the same as the first, as with guidance.
    """
    generator = torch.Generator().manual_seed(1 + number)
    x_t = torch.randn(rows // 2, 4, height, width, generator=generator)
    return torch.cat([x_t, x_t]), torch.tensor(800.0 - 100 * number), words(rows, context_width)
