"""Our conversion to a diffusers folder beside the library's own conversion of the same file."""

import json
import shutil

import diffusers
import make_checkpoint
import oracles
import pytest
import safetensors.torch
import torch
from conftest import rest_slow
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hostile import look
from test_convert import same_bits
from transformers import CLIPTextModel

from convert.actions.convert import convert
from convert.actions.diffusers_writer import WEIGHTS

KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


ONE_TEXT_ENCODER = sorted(name for name in make_checkpoint.FAMILIES if not name.startswith("sdxl"))  # see test_xl_files


@pytest.fixture(scope="module", params=rest_slow(ONE_TEXT_ENCODER))
def family(request, tmp_path_factory):
    """The config of a family, narrow; the tensors of an original file of it; the folder that we make of that."""
    path = tmp_path_factory.mktemp(request.param)
    config = make_checkpoint.tiny(make_checkpoint.FAMILIES[request.param])
    state = make_checkpoint.made_up_state_dict(config)
    make_checkpoint.save_original(path / "x.ckpt", state)
    convert(path / "x.ckpt", path / "folder", layout="diffusers")
    yield config, state, path / "folder"
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def theirs(family):
    """What the library makes of the same tensors, by component; it is told the sizes, not the names."""
    config, state, _ = family
    return {
        "unet": convert_ldm_unet_checkpoint(dict(state), dict(oracles.empty_unet(config).config)),
        "vae": convert_ldm_vae_checkpoint(dict(state), dict(oracles.empty_vae(config).config)),
        "text_encoder": text_encoder(config, state),
    }


def text_encoder(config, state):
    """Of version 2, the library's conversion also has the last layer, if it is not the 24th, and a projection."""
    if config.family.startswith("sd-v1"):
        return convert_ldm_clip_checkpoint(dict(state))
    empty = oracles.empty_text_encoder(config.text_encoder)
    found = convert_open_clip_checkpoint(empty, dict(state))
    names = {name.removeprefix("text_model.") for name in empty.state_dict()}
    return {name: value for name, value in found.items() if name.removeprefix("text_model.") in names}


def test_the_folder_is_of_the_family(family):
    config, _, folder = family
    assert look(folder).config == config
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert (name != "StableDiffusionPipeline", hasattr(diffusers, name)) == (config.unet.in_channels > 4, True)


@pytest.mark.parametrize("component", KINDS)
def test_names_shapes_and_bits_are_those_of_the_library_s_conversion(family, theirs, component):
    ours = safetensors.torch.load_file(family[2] / WEIGHTS[component])
    expected = {name: t for name, t in theirs[component].items() if not name.endswith("position_ids")}
    assert len(expected) == {"unet": 686, "vae": 248, "text_encoder": 36}[component]
    same_bits(ours, expected)


def test_both_conversions_make_the_same_picture(family, theirs):
    """Four guided steps of the library's DDIM and its decoder, from the same noise, in float32."""
    folder = family[2]
    ours = {part: kind.from_pretrained(folder / part, local_files_only=True).eval() for part, kind in KINDS.items()}
    own = {}
    for part in ("unet", "vae"):
        own[part] = KINDS[part].from_config(ours[part].config).eval()
        own[part].load_state_dict(theirs[part])
    own["text_encoder"] = CLIPTextModel(ours["text_encoder"].config).eval()
    wanted = own["text_encoder"].state_dict()
    bare = {name.removeprefix("text_model."): value for name, value in theirs["text_encoder"].items()}
    given = {name: bare[name.removeprefix("text_model.")] for name in wanted}
    own["text_encoder"].load_state_dict(given)
    first, second = picture(ours), picture(own)
    assert (first - second).abs().max() <= 1e-4 * first.abs().max()
    assert first.std() > 0.01


def picture(networks):
    generator = torch.Generator().manual_seed(11)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(4)
    tokens = torch.tensor([[49406, 320, 4558, *[49407] * 74], [49406, *[49407] * 76]])
    context = networks["text_encoder"](tokens).last_hidden_state
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    more = torch.randn(1, networks["unet"].config.in_channels - 4, 8, 8, generator=generator)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, more], dim=1).expand(2, -1, -1, -1)
        with_text, without = networks["unet"](inputs, timestep, context).sample.chunk(2)
        latents = scheduler.step(without + 7.5 * (with_text - without), timestep, latents).prev_sample
    return networks["vae"].decode(latents / networks["vae"].config.scaling_factor).sample
