"""Files of models that read depth: every name of the published one, both ways, and how they are told."""

from dataclasses import replace

import make_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import same_bits
from test_names import read_manifest

import sd
from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.merge import Merging, Share
from convert.actions.original_writer import schedule_buffers
from convert.actions.target import TargetError
from convert.errors import CheckpointError, WeightMismatchError
from convert.families.depth_sizes import with_depth_settings
from convert.layouts.depth_layout import PREFIX, depth_parameters, unused_parameters
from convert.layouts.joined import joined_names
from convert.layouts.names import original_names, parameter_shapes
from sd.config import DPT_HYBRID, SD_V1, SD_V1_DEPTH, SD_V2, SD_V2_DEPTH, ModelConfig

TINY = make_checkpoint.tiny(SD_V2_DEPTH)
COUNTERS = {"model_ema.decay": (), "model_ema.num_updates": ()}


@pytest.fixture(scope="module")
def state():
    return make_checkpoint.made_up_state_dict(TINY, ema=True)


@pytest.fixture
def path(tmp_path, state):
    save_file(state, tmp_path / "depth.safetensors")
    return tmp_path / "depth.safetensors"


def test_every_tensor_of_the_published_file_has_its_place():
    published = read_manifest("sd-v2.txt")  # but for its first convolution and the depth network, that of version 2
    published["model.diffusion_model.input_blocks.0.0.weight"] = (320, 5, 3, 3)
    published |= {f"depth_model.{name}": shape for name, shape in read_manifest("depth-network.txt").items()}
    assert len(published) == 1610
    shapes = parameter_shapes(SD_V2_DEPTH)
    found = {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(SD_V2_DEPTH).items()}
    assert len(found) == len(shapes)
    for name, parts in joined_names(SD_V2_DEPTH).items():
        of_parts = [found.pop(part) for part in parts]
        found[name] = (sum(shape[0] for shape in of_parts), *of_parts[0][1:])
    found |= {PREFIX + unused.original: unused.shape for unused in unused_parameters(DPT_HYBRID)}
    beside = make_checkpoint.unused_of_open_clip(SD_V2_DEPTH, torch.float32) | schedule_buffers(SD_V2.schedule)
    assert found | {name: tuple(value.shape) for name, value in beside.items()} | COUNTERS == published


@pytest.mark.slow
def test_original_ours_original_keeps_every_bit(tmp_path, path, state):
    kept = convert(path, tmp_path / "ours.safetensors", keep_all=True, verify=True)
    assert (kept.left_out, kept.checkpoint.unknown) == (0, ())
    report = inspect(tmp_path / "ours.safetensors")
    assert (report.problem, report.family) == (None, "sd-v2-depth")
    assert ("depth network", 252 + 8) in [  # with what nothing uses
        (part.name, part.tensors) for part in inspect(path).components
    ]
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", layout="original", verify=True)
    same_bits(load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.slow
def test_a_folder_of_diffusers_and_back(tmp_path, path, state):
    convert(path, tmp_path / "folder", layout="diffusers", verify=True)
    assert inspect(tmp_path / "folder").family == "sd-v2-depth"
    convert(tmp_path / "folder", tmp_path / "ours.safetensors", verify=True)
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", layout="original", verify=True)
    back = load_file(tmp_path / "back.safetensors")
    networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "depth_model.")
    unused = set(make_checkpoint.unused_of_open_clip(TINY, torch.float32))
    unused |= {PREFIX + found.original for found in unused_parameters(TINY.depth)}
    same_bits(back, {n: value for n, value in state.items() if n.startswith(networks) and n not in unused})


@pytest.mark.slow
def test_the_folder_loads_in_the_libraries_without_a_weight_missing(tmp_path, path, state):
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    convert(path, tmp_path / "folder", layout="diffusers")
    theirs, loading = DPTForDepthEstimation.from_pretrained(
        tmp_path / "folder" / "depth_estimator", local_files_only=True, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    side = TINY.depth.native_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = sd.load(tmp_path / "folder", precision="fp32").depth_network(image)
    assert (ours - theirs(image).predicted_depth[:, None]).abs().max() < 1e-5 * ours.max()
    assert ours.std() > 0.01 * ours.mean() > 0
    assert DPTImageProcessor.from_pretrained(tmp_path / "folder" / "feature_extractor").size["height"] == side


def test_the_depth_network_is_float32_in_every_precision(tmp_path):
    state = make_checkpoint.made_up_state_dict(TINY, dtype=torch.float16)
    save_file(state, tmp_path / "half.safetensors")
    model = sd.load(tmp_path / "half.safetensors", precision="bf16")
    assert {parameter.dtype for parameter in model.depth_network.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.text_encoder.parameters()} == {torch.bfloat16}
    stored = state[f"{PREFIX}pretrained.model.blocks.3.attn.qkv.weight"].float()
    assert torch.equal(model.depth_network.layers[3].attention.k.weight, stored[64:128])


@pytest.mark.slow
@pytest.mark.parametrize("family", [SD_V1_DEPTH, replace(SD_V2_DEPTH, depth=None)], ids=lambda each: each.family)
def test_a_model_without_a_depth_network_is_told_by_its_channels(tmp_path, family):
    config = make_checkpoint.tiny(family)
    make_checkpoint.save_original(tmp_path / "x.ckpt", make_checkpoint.made_up_state_dict(config))
    model = sd.load(tmp_path / "x.ckpt")
    assert (model.config, model.depth_network) == (config, None)
    convert(tmp_path / "x.ckpt", tmp_path / "folder", layout="diffusers", verify=True)
    convert(tmp_path / "folder", tmp_path / "ours.safetensors", verify=True)
    assert sd.load(tmp_path / "ours.safetensors").config == config


@pytest.mark.slow
def test_a_depth_network_in_a_model_of_version_1_is_used(tmp_path):
    config = make_checkpoint.tiny(replace(SD_V1_DEPTH, depth=DPT_HYBRID))
    make_checkpoint.save_original(tmp_path / "x.ckpt", make_checkpoint.made_up_state_dict(config))
    convert(tmp_path / "x.ckpt", tmp_path / "ours.safetensors", verify=True)
    assert sd.load(tmp_path / "ours.safetensors").config == config


def test_configs_with_and_without_a_depth_network_come_back_from_json():
    assert "depth" not in SD_V1.to_dict()  # as files that were written before have it
    for config in (SD_V1, SD_V2_DEPTH):
        assert ModelConfig.from_dict(config.to_dict()) == config


DAMAGE = {
    "a weight lost": ("scratch.layer1_rn.weight", None, "lacks 1 of"),
    "a weight more": ("scratch.more.weight", (1,), "has no place for"),
    "another shape": ("scratch.layer2_rn.weight", (3, 3), "1 weight that does not fit an sd-v2-depth model"),
    "odd groups": ("pretrained.model.patch_embed.backbone.stem.conv.weight", (33, 3, 7, 7), "groups must divide"),
    "a flat convolution": ("pretrained.model.patch_embed.proj.weight", (64, 128), "4 axes are expected"),
    "no rows": ("pretrained.model.pos_embed", (1, 0, 64), "none of them 0"),
    "no positions": (
        "pretrained.model.pos_embed",
        None,
        "without pretrained.model.pos_embed: it is incomplete, or not",
    ),
    "another layer": ("pretrained.model.blocks.400.norm1.weight", (64,), "lacks"),
    "thirds that are none": ("pretrained.model.blocks.0.attn.qkv.bias", (64,), "lacks 3 of"),
}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"backbone_out_indices": [0, 1, 8, 12]}, "reads the output of layers [8, 12], counted from 0; 2 of 0 to 11"),
        ({"backbone_out_indices": [0, 1, 9, 9]}, "layers [9, 9], counted from 0"),
        ({"backbone_out_indices": [2, 11]}, "backbone_out_indices is [2, 11]; a list of 4 whole numbers"),
        ({"backbone_out_indices": "last"}, "backbone_out_indices is last; a list of 4"),
        ({"is_hybrid": False}, "is_hybrid = False; only True is supported."),
        ({"num_attention_heads": 5}, "5 heads for a width of 64"),
        ({"num_hidden_layers": 24}, "contradicts its weights: num_hidden_layers is 24, the weights have 12"),
    ],
)
def test_settings_of_another_depth_network_are_refused(settings, problem):
    with pytest.raises(CheckpointError) as caught:
        with_depth_settings(TINY.depth, settings)
    assert problem in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_depth_networks_are_refused(tmp_path, state, name, shape, problem):
    damaged = {key: value for key, value in state.items() if not key.startswith("model_ema")}
    damaged.pop(PREFIX + name, None)
    damaged |= {} if shape is None else {PREFIX + name: torch.zeros(shape)}
    save_file(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        sd.load(tmp_path / "damaged.safetensors")


@pytest.mark.slow
def test_other_heads_and_taps_stay_in_ours_and_in_folders_and_are_refused_for_the_original(tmp_path):
    depth = replace(TINY.depth, heads=2, taps=(2, 7), groups=16)
    config = replace(TINY, depth=depth)
    make_checkpoint.save_original(tmp_path / "x.ckpt", make_checkpoint.made_up_state_dict(TINY))
    convert(tmp_path / "x.ckpt", tmp_path / "folder", layout="diffusers")
    settings = tmp_path / "folder" / "depth_estimator" / "config.json"
    text = settings.read_text().replace('"num_attention_heads": 1', '"num_attention_heads": 2')
    text = text.replace('"num_groups": 32', '"num_groups": 16')
    settings.write_text(text.replace("    8,\n    11\n", "    2,\n    7\n"))
    convert(tmp_path / "folder", tmp_path / "ours.safetensors", verify=True)
    assert sd.load(tmp_path / "ours.safetensors").config == config
    with pytest.raises(TargetError, match="heads, groups and taps"):
        convert(tmp_path / "ours.safetensors", tmp_path / "back.ckpt", layout="original")
    settings.write_text(text.replace('"hidden_size": 64', '"hidden_size": 96'))
    with pytest.raises(WeightMismatchError, match="hidden_size is 96, the weights have 64"):
        sd.load(tmp_path / "folder")
    settings.unlink()
    with pytest.raises(CheckpointError, match=r"has no depth_estimator/config\.json"):
        sd.load(tmp_path / "folder")


@pytest.mark.slow
def test_a_merge_keeps_the_depth_network_of_the_first_model(tmp_path):
    for seed in (0, 1):
        state = make_checkpoint.made_up_state_dict(TINY, seed)
        make_checkpoint.save_original(tmp_path / f"{seed}.ckpt", state)
    merging = Merging(tmp_path / "1.ckpt", None, Share(base=0.5))
    convert(tmp_path / "0.ckpt", tmp_path / "merged.safetensors", changing=merging)
    assert (merging.kept["depth_network"], merging.merged["depth_network"]) == (
        len(list(depth_parameters(TINY.depth))),
        0,
    )
    merged, first = (load_file(tmp_path / "merged.safetensors"), make_checkpoint.made_up_weights(TINY, 0))
    name = "depth_network.layers.3.attention.k.weight"
    assert torch.equal(merged[name], first[name])
    assert not torch.equal(merged["unet.out.conv.weight"], first["unet.out.conv.weight"])
