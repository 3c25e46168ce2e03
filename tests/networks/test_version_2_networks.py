"""Stable Diffusion 2: its networks against diffusers and transformers, its files name by name."""

from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import fill
from oracles import diffusers_unet, relative_error, transformers_text_encoder
from test_parity import FULL, NARROW, tokens, unet_error

from sd.config import SD_V1_EDIT, SD_V2, SD_V2_DEPTH, SD_V2_INPAINTING
from sd.text.tokenizer import Tokenizer

FAMILIES = [SD_V2, SD_V2_INPAINTING, SD_V2_DEPTH]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
def test_narrow_unet_equals_diffusers(family):
    config = make_checkpoint.tiny(family)
    assert len(set(config.unet.heads)) > 1
    networks = fill(config)
    assert unet_error(config, networks, 8, 8) < NARROW
    wrong = replace(config, unet=replace(config.unet, heads=config.unet.heads[:1] * 4))
    theirs = diffusers_unet(wrong, networks)
    x_t, context = torch.randn(1, config.unet.in_channels, 8, 8), torch.randn(1, 77, 64)
    ours = networks["unet"](x_t, torch.tensor(500), context)
    assert relative_error(ours, theirs(x_t, 500, context).sample) > 100 * NARROW  # the heads are the family's


def test_the_context_is_the_last_layer_but_one_with_the_final_norm():
    """Against a tower with one layer more, as it is in the files; it is padded with 0, which changes the context."""
    config = make_checkpoint.tiny(SD_V2)
    networks = fill(config)
    whole = replace(config, text_encoder=replace(config.text_encoder, layers=config.text_encoder.layers + 1))
    longer = fill(whole)
    longer["text_encoder"].load_state_dict(networks["text_encoder"].state_dict(), strict=False)
    theirs = transformers_text_encoder(whole, longer)
    ids = torch.from_numpy(Tokenizer(pad_token=0)(["a horse", ""]))
    assert (ids[1, 2:] == 0).all()
    hidden = theirs(ids, output_hidden_states=True).hidden_states[-2]
    final_norm = theirs.final_layer_norm if hasattr(theirs, "final_layer_norm") else theirs.text_model.final_layer_norm
    assert relative_error(networks["text_encoder"](ids), final_norm(hidden)) < NARROW
    assert relative_error(networks["text_encoder"](ids), networks["text_encoder"](tokens("a horse", ""))) > 0.01


FULL_SIZE = [SD_V2, SD_V2_INPAINTING, SD_V2_DEPTH, SD_V1_EDIT]  # 4, 9, 5 and 8 channels


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL_SIZE, ids=lambda family: family.family)
def test_full_size_networks_equal_those_of_the_libraries(family):
    networks = fill(replace(family, depth=None))  # that network has a test of its own
    assert unet_error(family, networks, 32, 48, batch=1) < FULL
    ids = torch.from_numpy(
        Tokenizer(pad_token=family.text_encoder.pad_token)(["a photograph of an astronaut riding a horse", ""])
    )
    theirs = transformers_text_encoder(family, networks)
    assert relative_error(networks["text_encoder"](ids), theirs(ids).last_hidden_state) < FULL
