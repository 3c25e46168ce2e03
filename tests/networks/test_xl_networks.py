"""Stable Diffusion XL: its networks against diffusers and transformers."""

import copy
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import fill
from oracles import diffusers_unet, relative_error, transformers_text_encoder
from test_parity import FULL, NARROW, randn

from sd.config import OPEN_CLIP_BIG_G, SDXL, SDXL_INPAINTING, SDXL_REFINER
from sd.networks.build import build_networks
from sd.pipeline.vector import NUMBER_WIDTH, numbers_about, vector_of
from sd.text.tokenizer import Tokenizer

FAMILIES = [SDXL, SDXL_INPAINTING, SDXL_REFINER]
TEXT = ["a photograph of an astronaut riding a horse", ""]
NUMBERS = {6: [1500, 1501, 16, 32, 1024, 768], 5: [1500, 1501, 16, 32, 2.5]}


@pytest.fixture(scope="module")
def narrow():
    """A narrow config of each family, and its networks."""
    configs = {family.family: make_checkpoint.tiny(family) for family in FAMILIES}
    return {name: (config, fill(config)) for name, config in configs.items()}


def count(config, component):
    return sum(parameter.numel() for parameter in build_networks(config)[component].parameters())


def test_the_numbers_of_parameters_are_those_of_the_original_modules():
    unets = {family.family: count(family, "unet") for family in FAMILIES}
    assert unets == {"sdxl": 2_567_463_684, "sdxl-inpainting": 2_567_478_084, "sdxl-refiner": 2_259_526_660}
    assert count(SDXL, "text_encoder") == 123_060_480
    assert count(SDXL, "text_encoder_2") == count(SDXL_REFINER, "text_encoder") == 694_659_841 - 1  # the logit scale


def unet_errors(config, networks, height, width, batch=2):
    """Against diffusers with the same numbers, and with one of them changed."""
    unet, texts = config.unet, (config.text_encoder, config.text_encoder_2)
    pooled = randn(batch, sum(text.pooled_width for text in texts if text), seed=2)
    numbers = NUMBERS[(unet.vector_width - pooled.shape[1]) // NUMBER_WIDTH]
    x_t, context = randn(batch, unet.in_channels, height, width), randn(batch, 77, unet.context_width, seed=1)
    theirs, timestep = diffusers_unet(config, networks), torch.tensor(801)
    ours = networks["unet"](x_t, timestep, context, vector_of(pooled, numbers))

    def error(time_ids):
        added = {"text_embeds": pooled, "time_ids": torch.tensor([time_ids] * batch)}
        return relative_error(ours, theirs(x_t, timestep, context, added_cond_kwargs=added).sample)

    return error(numbers), error([*numbers[:-1], 500])


@pytest.mark.parametrize("family", [family.family for family in FAMILIES])
def test_narrow_unet_equals_diffusers(narrow, family):
    right, wrong = unet_errors(*narrow[family], 8, 12)
    assert right < NARROW
    assert wrong > 10 * NARROW


def test_bfloat16_does_not_round_the_sizes():
    pooled = torch.zeros(1, 4, dtype=torch.bfloat16)
    vectors = [vector_of(pooled, [size] * 6) for size in (1500.0, 1504.0)]
    assert vectors[0].dtype == torch.bfloat16
    assert not torch.equal(*vectors)


def test_numbers_are_height_first():
    assert numbers_about(6, (768, 1024)) == [768, 1024, 0, 0, 768, 1024]
    assert numbers_about(6, (768, 1024), original=(512, 640), crop=(8, 16)) == [512, 640, 8, 16, 768, 1024]
    assert numbers_about(5, (768, 1024)) == [768, 1024, 0, 0, 6.0]
    assert numbers_about(5, (768, 1024), score=2.5)[-1] == 2.5
    with pytest.raises(ValueError, match="5 or 6 numbers beside the prompt, got 4"):
        numbers_about(4, (768, 1024))


def towers(config):
    """The text encoders of a family, each with the padding that it was trained with."""
    for component in ("text_encoder", "text_encoder_2"):
        if text := getattr(config, component):
            yield component, torch.from_numpy(Tokenizer(pad_token=text.pad_token)(TEXT))


def text_errors(config, networks, skip_layers=0):
    """Of context and pooled vector, against transformers."""
    for component, ids in towers(config):
        context, pooled = networks[component].encode(ids, skip_layers=skip_layers)
        assert torch.equal(networks[component](ids, skip_layers=skip_layers), context)
        theirs = transformers_text_encoder(config, networks, component)(ids, output_hidden_states=True)
        yield relative_error(context, theirs.hidden_states[-1 - max(skip_layers, 1)])
        if component == "text_encoder" and config.text_encoder_2:
            assert pooled is None
        else:
            yield relative_error(pooled, theirs.text_embeds)


@pytest.mark.parametrize(("family", "skip_layers"), [("sdxl", 0), ("sdxl", 1), ("sdxl", 2), ("sdxl-refiner", 0)])
def test_the_context_is_an_inner_layer_without_the_final_norm(narrow, family, skip_layers):
    assert max(text_errors(*narrow[family], skip_layers)) < NARROW


def test_the_pooled_vector_is_that_of_the_end_token_also_with_learned_words(narrow):
    """Their ids are larger than the end token's, and of the largest other programs take the vector."""
    network = copy.deepcopy(narrow["sdxl-refiner"][1]["text_encoder"])
    ids = torch.from_numpy(Tokenizer(pad_token=0)(["a cat"]))
    plain = network.encode(ids)[1]
    network.token_embedding.weight = torch.nn.Parameter(torch.cat([network.token_embedding.weight, randn(1, 64)]))
    learned = torch.where(ids == 2368, 49408, ids)  # "cat"
    assert (learned == 49408).sum() == 1
    alone = network.token_embedding.weight
    alone.data[2368] = alone.data[49408]
    assert torch.equal(network.encode(learned)[1], network.encode(ids)[1])
    assert not torch.equal(network.encode(ids)[1], plain)


@pytest.mark.parametrize("skip_layers", [-1, 3])
def test_no_more_layers_are_skipped_than_there_are(narrow, skip_layers):
    with pytest.raises(ValueError, match="skip_layers must be 0 to 2"):
        narrow["sdxl"][1]["text_encoder"](torch.zeros(1, 77, dtype=torch.int64), skip_layers=skip_layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", [SDXL, SDXL_REFINER], ids=lambda family: family.family)
def test_full_size_text_encoders_equal_transformers(family):
    networks = fill(replace(family, unet=make_checkpoint.tiny(family).unet))
    assert max(text_errors(family, networks)) < FULL


@pytest.mark.slow
@pytest.mark.parametrize("family", [SDXL, SDXL_REFINER], ids=lambda family: family.family)
def test_full_size_unet_equals_diffusers(family):
    """In float32: both have the same weights in memory, 10.3 and 9 GB."""
    small = replace(make_checkpoint.tiny(family), unet=family.unet)
    texts = {name: getattr(family, name) for name in ("text_encoder", "text_encoder_2")}
    networks = fill(small)
    right, wrong = unet_errors(replace(small, **texts), networks, 16, 24, batch=1)
    assert right < FULL
    assert wrong > 10 * right


def test_open_clip_pads_with_zeros():
    assert OPEN_CLIP_BIG_G.pad_token == 0
    ids = dict(towers(SDXL))
    assert (ids["text_encoder"][1, 2:] == 49407).all()
    assert (ids["text_encoder_2"][1, 2:] == 0).all()
