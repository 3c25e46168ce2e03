"""Files of UNets that take the guidance scale as an input, as full latent consistency models do."""

import json
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import TINY
from hostile import look, refused_model
from safetensors.torch import load_file, save_file
from test_convert import same_bits

import sd
from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.families.stated_config import stated_config
from convert.layouts.names import diffusers_names, original_names
from sd.config import SDXL, ModelConfig

WIDTH = 32
INPUT = "model.diffusion_model.time_embed.cond_proj.weight"
CONFIGS = {
    config.family: replace(config, unet=replace(config.unet, guidance_width=WIDTH))
    for config in (TINY, make_checkpoint.tiny(SDXL))
}


@pytest.fixture(scope="module")
def state():
    made = make_checkpoint.made_up_state_dict(CONFIGS["sd-v1"])
    return {name: value.clone() for name, value in made.items() if "model_ema" not in name}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_layout_has_a_place_for_it(family):
    ours = "unet.cond_proj.weight"
    assert original_names(CONFIGS[family])[ours].name == INPUT
    assert diffusers_names(CONFIGS[family])[ours].name == "unet.time_embedding.cond_proj.weight"
    assert ModelConfig.from_dict(json.loads(json.dumps(CONFIGS[family].to_dict()))) == CONFIGS[family]
    assert "guidance_width" not in TINY.to_dict()["unet"]  # files of other models stay as they are


@pytest.mark.parametrize("spelling", ["time_embed.", "time_embedding."])
def test_a_file_is_recognised_and_loaded_with_it(tmp_path, state, spelling):
    """Under the name of the layers beside it, and under diffusers' name for it."""
    renamed = {name.replace("time_embed.cond", f"{spelling}cond"): value for name, value in state.items()}
    save_file(renamed, tmp_path / "m.safetensors")
    assert look(tmp_path / "m.safetensors").config == CONFIGS["sd-v1"]
    model = sd.load(tmp_path / "m.safetensors", precision="fp32")
    assert torch.equal(model.unet.cond_proj.weight, state[INPUT])
    assert inspect(tmp_path / "m.safetensors").problem is None


@pytest.mark.slow
def test_layouts_lead_to_each_other_and_back_bit_by_bit(tmp_path, state):
    from diffusers import StableDiffusionPipeline

    save_file(state, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "ours.safetensors", verify=True)
    convert(tmp_path / "ours.safetensors", tmp_path / "folder", layout="diffusers", verify=True)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="original", verify=True)
    found = load_file(tmp_path / "back.safetensors")
    same_bits(found, {name: value for name, value in state.items() if name in found})
    assert found.keys() >= {original.name for original in original_names(CONFIGS["sd-v1"]).values()}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert pipeline.unet.config.time_cond_proj_dim == WIDTH
    assert torch.equal(pipeline.unet.time_embedding.cond_proj.weight, state[INPUT])
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    index = tmp_path / "folder/model_index.json"  # as the published folder of version 1 names it
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"LatentConsistencyModelPipeline"'))
    assert look(tmp_path / "folder").config == CONFIGS["sd-v1"]
    settings = tmp_path / "folder/unet/config.json"
    settings.write_text(settings.read_text().replace(f'"time_cond_proj_dim": {WIDTH}', '"time_cond_proj_dim": 64'))
    refused_model(tmp_path / "folder", UnsupportedFileError, "time_cond_proj_dim = 64")


def test_a_config_that_does_not_have_it_contradicts_the_file(tmp_path, state):
    save_file(state, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "ours.safetensors")
    tensors = look(tmp_path / "ours.safetensors").tensors
    assert stated_config(json.dumps(CONFIGS["sd-v1"].to_dict()), tensors) == CONFIGS["sd-v1"]
    wrong = replace(CONFIGS["sd-v1"], unet=replace(CONFIGS["sd-v1"].unet, guidance_width=64))
    with pytest.raises(WeightMismatchError, match="contradicts its tensors"):
        stated_config(json.dumps(wrong.to_dict()), tensors)
