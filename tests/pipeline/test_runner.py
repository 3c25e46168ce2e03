"""The plain runner makes the pictures that the fast one makes, and refuses what it cannot do."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, assemble, fill, final, pixels, settings

from sd.pipeline.runner import NonFiniteError, Runner
from sd.pipeline.settings import SettingError


@pytest.fixture
def plain(model):
    return replace(model, runner=Runner())


def test_pictures_are_the_same(model, plain):
    for options in ({}, {"sampler": "euler_a", "guidance_scale": 1.0}, {"hires": 1.5}):
        batch = [settings(seed=seed, **options) for seed in (1, 2)]
        for one, other in zip(plain.make(batch), model.make(batch), strict=True):
            assert abs(pixels(one) - pixels(other)).max() <= 1, options
    assert "run" not in plain.texts(settings())["sd"]


@pytest.mark.parametrize("options", [{"tile": "x"}, {"merge_tokens": 0.5}, {"reuse_features": 2}])
def test_settings_that_change_how_the_network_computes_are_refused(plain, options):
    with pytest.raises(SettingError, match="needs the runner"):
        final(plain, [settings(**options)])


@pytest.mark.parametrize(
    ("part", "weight"), [("text_encoder", "final_norm"), ("unet", "out.conv"), ("vae", "decoder.conv_out")]
)
def test_values_that_are_not_finite_are_raised(part, weight):
    networks = fill(TINY)
    networks[part].get_submodule(weight).bias.fill_(torch.inf)
    with pytest.raises(NonFiniteError) as raised:
        replace(assemble(TINY, networks), runner=Runner()).make([settings(steps=1)])
    assert raised.value.part == part
