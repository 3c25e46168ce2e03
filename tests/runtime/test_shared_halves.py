"""What both halves of guidance have in common is computed once; predictions stay the same."""

import pytest
import torch
from conftest import TINY, fill, final, settings
from predictions import guided_inputs, relative_error, unet_with_attention_at

from sd.runtime.patching import patched
from sd.runtime.shortcuts.shared_halves import computed_once

B = 3


@pytest.fixture(scope="module")
def unet():
    return fill(TINY)["unet"]


def test_the_prediction_is_the_same(unet):
    x_t, timestep, context = guided_inputs(rows=2 * B)
    expected = unet(x_t, timestep, context)
    with patched(computed_once(unet)):
        found = unet(x_t, timestep, context)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(expected[:B], expected[B:]) > 1e-3  # the words do matter
    assert torch.equal(unet(x_t, timestep, context), expected)


@pytest.mark.parametrize("depths", [(0, 2, 1, 0), (0, 0, 0, 0)])
def test_also_with_several_blocks_in_a_transformer_and_without_attention_on_the_way_down(depths):
    network, given = unet_with_attention_at(*depths), guided_inputs(rows=2 * B)
    expected = network(*given)
    with patched(computed_once(network)):
        assert relative_error(network(*given), expected) < 1e-6


def test_only_what_comes_before_the_words_is_done_for_half_of_the_rows(unet):
    rows = {}

    def counted(name, plain):
        def forward(x, *others):
            rows[name] = len(x)
            return plain(x, *others)

        return forward

    block = unet.input_blocks[1]
    transformer = block.attention.blocks[0]
    watched = {
        "conv": unet.input_blocks[0].conv,
        "residual": block.residual.conv1,
        "self": transformer.self_attention.q,
        "cross": transformer.cross_attention.q,
        "next": unet.input_blocks[2].residual.conv1,
        "last": unet.output_blocks[-1].residual.conv1,
    }
    counting = {module: counted(name, module.forward) for name, module in watched.items()}
    with patched(counting), patched(computed_once(unet)):
        unet(*guided_inputs(rows=2 * B))
    assert rows == {"conv": B, "residual": B, "self": B, "cross": 2 * B, "next": 2 * B, "last": 2 * B}


def test_pictures_with_guidance_are_made_so_and_those_without_are_not(model, monkeypatch):
    entered = []

    def counted(unet):
        entered.append(unet)
        return computed_once(unet)

    monkeypatch.setattr("sd.runtime.execution.computed_once", counted)
    final(model, [settings(steps=2, guidance_scale=1.0)])
    assert not entered
    final(model, [settings(steps=2)])
    assert len(entered) == 2
