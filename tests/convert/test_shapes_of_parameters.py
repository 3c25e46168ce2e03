"""The shapes that the converter knows are those of the networks."""

from dataclasses import replace

import pytest
from conftest import TINY

from convert.layouts.names import original_names
from convert.layouts.shapes import parameter_shapes
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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_are_those_of_the_networks(config):
    assert parameter_shapes(config) == built_shapes(build_networks(config))


def test_every_parameter_has_a_name_in_the_original():
    assert parameter_shapes(SD_V1).keys() == original_names(SD_V1).keys()
