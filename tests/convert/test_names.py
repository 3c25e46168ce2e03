"""The tables of names and shapes against the list of tensors of the original file and against the networks."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY

from convert.actions.original_writer import schedule_buffers
from convert.layouts.names import PREFIXES, ema_name, original_names, parameter_shapes
from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.networks.build import parameter_shapes as built_shapes

CONFIGS = {
    "v1": SD_V1,
    "narrow": TINY,
    "inpainting": replace(SD_V1, unet=replace(SD_V1.unet, in_channels=9)),
    "other multipliers": replace(
        TINY,
        unet=replace(TINY.unet, multipliers=(1, 1, 2, 2), residuals_per_level=3, middle_depth=2),
        vae=replace(TINY.vae, multipliers=(2, 1, 3), latent_channels=8, residuals_per_level=1),
    ),
}


def read_manifest(name):
    """name -> shape, of every tensor in a published file"""
    text = (Path(__file__).parents[1] / "golden" / name).read_text()
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name: tuple(map(int, shape.split("x"))) if shape != "-" else () for name, _, shape in rows}


@pytest.fixture(scope="module")
def manifest():
    return read_manifest("sd-v1.txt")


def weights(manifest):
    ids = "embeddings.position_ids"
    return {
        name: shape
        for name, shape in manifest.items()
        if name.startswith(tuple(PREFIXES.values())) and not name.endswith(ids)
    }


def test_every_original_weight_is_named_exactly_once(manifest):
    names = [original.name for original in original_names(SD_V1).values()]
    assert len(names) == len(set(names)) == 1130
    assert set(names) == set(weights(manifest))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_and_shapes_of_ours_are_those_of_the_networks(config):
    assert parameter_shapes(config) == built_shapes(build_networks(config))
    assert parameter_shapes(config).keys() == original_names(config).keys()


def test_shapes_are_the_original_ones_up_to_unit_axes(manifest):
    shapes = parameter_shapes(SD_V1)
    for ours, original in original_names(SD_V1).items():
        assert shapes[ours] + (1,) * original.unit_axes == manifest[original.name], ours


def test_linear_layers_that_were_1x1_convolutions_are_the_32_of_the_unet_and_8_of_the_vae():
    pointwise = [ours for ours, original in original_names(SD_V1).items() if original.unit_axes]
    assert sum(name.startswith("unet.") for name in pointwise) == 2 * 16
    assert sum(name.startswith("vae.") for name in pointwise) == 2 * 4
    assert len(pointwise) == 40


def test_names_of_averaged_weights_have_no_dots_left(manifest):
    unet = [name for name in weights(manifest) if name.startswith(PREFIXES["unet"])]
    averaged = {ema_name(name) for name in unet}
    assert len(averaged) == len(unet) == 686
    assert ema_name("model.diffusion_model.input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_the_made_up_checkpoint_has_the_names_and_shapes_of_the_original(manifest):
    import make_checkpoint
    import torch

    with torch.device("meta"):
        shapes = {name: tuple(table.shape) for name, table in schedule_buffers(SD_V1.schedule).items()}
    tiny = make_checkpoint.made_up_state_dict(TINY)
    assert set(shapes) == set(manifest) - set(weights(manifest)) - {
        "model_ema.decay",
        "model_ema.num_updates",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    }
    missing = {name for name in manifest if name not in tiny}
    assert not {name for name in missing if "text_model.encoder.layers" not in name}  # the narrow one has 2 layers
    assert not set(tiny) - set(manifest)
