"""Configs: the numbers of each family, and their way through JSON."""

import json
from dataclasses import replace

import pytest
from conftest import TINY

from sd.config import SD_V1, SD_V1_INPAINTING, ModelConfig
from sd.networks.build import build_networks


@pytest.mark.parametrize("config", [SD_V1, SD_V1_INPAINTING, TINY])
def test_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def parameters(config, part):
    return sum(parameter.numel() for parameter in build_networks(config)[part].parameters())


def test_full_size_networks_have_the_published_numbers_of_parameters():
    # counts of the original modules, instantiated from their own configs
    assert parameters(SD_V1, "unet") == 859_520_964
    assert parameters(SD_V1, "vae") == 83_653_863
    assert parameters(SD_V1, "text_encoder") == 123_060_480
    assert parameters(SD_V1_INPAINTING, "unet") == 859_535_364


def test_heads_and_context_width_come_from_the_config():
    # Stable Diffusion 2: 64 wide heads, context 1024
    config = replace(SD_V1, unet=replace(SD_V1.unet, heads=(5, 10, 20, 20), context_width=1024))
    assert parameters(config, "unet") == 865_910_724
    network = build_networks(config)["unet"]
    assert network.input_blocks[4]["attention"].blocks[0].cross_attention.heads == 10
    assert network.middle_block["attention"].blocks[0].self_attention.heads == 20


def test_transformers_may_have_any_depth():
    # the widths, depths and heads of Stable Diffusion XL, without its extra embedding (2,816 -> 1280 -> 1280)
    unet = replace(
        SD_V1.unet, multipliers=(1, 2, 4), depths=(0, 2, 10), middle_depth=10, heads=(5, 10, 20), context_width=2048
    )
    label_embedding = (2816 + 1) * 1280 + (1280 + 1) * 1280
    assert parameters(replace(SD_V1, unet=unet), "unet") == 2_567_463_684 - label_embedding
