"""Configs: the numbers of each family, and their way through JSON."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
from conftest import TINY

import sd
from convert.families.table import MODELS
from sd.config import SD_V1, SD_V1_INPAINTING, SD_V2_DEPTH, SDXL, SDXL_REFINER, ModelConfig
from sd.networks.build import build_networks


@pytest.mark.parametrize("config", [SD_V1, SD_V1_INPAINTING, SD_V2_DEPTH, SDXL, SDXL_REFINER, TINY])
def test_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_names_only_what_a_model_has():
    assert SD_V1.to_dict().keys() == {
        *["family", "text_encoder", "unet", "vae", "schedule", "prediction", "native_size"]
    }
    assert {*SDXL.to_dict()} - {*SD_V1.to_dict()} == {"text_encoder_2"}
    assert {*SDXL.to_dict()["unet"]} - {*SD_V1.to_dict()["unet"]} == {"vector_width"}


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


def test_every_family_that_can_be_loaded_is_listed():
    assert {*sd.list_models()} == {row.config.family for row in MODELS if row.config}
    for family in sd.list_models():
        assert sd.get_config(family).family == family
    with pytest.raises(FrozenInstanceError):
        sd.get_config("sdxl").native_size = 512


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sdxl-base", "there is no family 'sdxl-base'; there are sdxl, sdxl-refiner"),
        ("SDXL-Refiner", "there are sdxl-refiner, sdxl"),
        ("flux", "there is no family 'flux'; there are sd-v1, "),
        ("x" * 10_000, f"there is no family '{'x' * 60}'; there are sd-v1, "),
        (SDXL, "a family is named by a string, such as 'sdxl'; got ModelConfig"),
    ],
)
def test_an_unknown_family_is_answered_with_those_that_exist(name, said):
    with pytest.raises(ValueError, match="family") as error:
        sd.get_config(name)
    assert said in str(error.value)
    assert not isinstance(name, str) or all(family in str(error.value) for family in sd.list_models())


def test_listing_families_imports_no_torch():
    code = "import sys, sd; sd.get_config(sd.list_models()[-1]); assert not {'torch', 'convert'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
