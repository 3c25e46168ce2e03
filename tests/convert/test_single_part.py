"""One network alone: written under the names that other tools read, and found again whatever its layout."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import TINY, refused
from safetensors import safe_open
from test_convert import same_bits

from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.target import LAYOUTS, TargetError
from convert.errors import CheckpointError
from convert.files.reader import open_checkpoint
from convert.layouts.names import PREFIXES, original_names
from convert.single_part import read_part
from sd.config import SD_V1

PARTS = tuple(PREFIXES)
# what stands in front of the names of a part alone in the original layout: as single files of each kind are published
BARE = {
    "unet": ("model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"),
    "vae": ("", "encoder.conv_in.weight"),
    "text_encoder": ("text_model.", "text_model.embeddings.token_embedding.weight"),
}


def wanted(state, part):
    """The tensors of a part by the names of the whole file."""
    return {
        original.name: state[original.name]
        for ours, original in original_names(TINY).items()
        if ours.startswith(f"{part}.")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_ckpt):
    """Every part in every layout, by (part, layout)."""
    folder = tmp_path_factory.mktemp("parts")
    paths = {}
    for part in PARTS:
        for layout in LAYOUTS:
            path = folder / (f"{part}-{layout}" + ("" if layout == "diffusers" else ".safetensors"))
            done = convert(tiny_ckpt, path, layout=layout, part=part, verify=True)
            assert done.verified.same == done.tensors
            paths[part, layout] = path
    yield paths
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.slow
def test_a_part_in_the_original_layout_has_the_names_of_single_files(alone, tiny_state, part):
    prefix, example = BARE[part]
    read = safetensors.torch.load_file(alone[part, "original"])
    assert example in read
    expected = {prefix + name.removeprefix(PREFIXES[part]): t for name, t in wanted(tiny_state, part).items()}
    same_bits(read, expected)


def test_a_part_in_our_layout_says_which_it_is(alone):
    with safe_open(alone["vae", "sd-zoo"], "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert (metadata["format"], metadata["part"]) == ("sd-zoo", "vae")
    assert json.loads(metadata["config"])["vae"]["width"] == 32
    assert all(name.startswith("vae.") for name in names)
    assert len(names) == 248


def test_diffusers_and_transformers_load_each_part_from_its_folder(alone):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    for part, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}.items():
        folder = alone[part, "diffusers"]
        _, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_alone_is_found_again_with_the_same_bits(alone, tmp_path, tiny_state, part, layout):
    back = tmp_path / "back.safetensors"
    expected = {BARE[part][0] + name.removeprefix(PREFIXES[part]): t for name, t in wanted(tiny_state, part).items()}
    path = alone[part, layout]
    for source in [path, *path.glob("*.safetensors")]:  # the file of a folder is read without it, too
        convert(source, back, layout="original", part=part, force=True)
        same_bits(safetensors.torch.load_file(back), expected)
        with open_checkpoint(source) as file:
            assert getattr(read_part(file, part).config, part) == getattr(TINY, part)


def test_inspect_names_each_part_and_gives_it_one_hash_in_every_layout(alone, tiny_ckpt):
    words = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
    for part in PARTS:
        reports = [inspect(alone[part, layout], tensors_hashed=True) for layout in LAYOUTS]
        assert [report.part for report in reports] == [part] * 3
        assert [report.layout for report in reports] == list(LAYOUTS)
        assert all(f"{words[part]} alone" in report.kind for report in reports)
        assert [[found.name for found in report.components] for report in reports] == [[words[part]]] * 3
        assert len({report.tensors_sha256 for report in reports}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_is_no_model_and_no_other_part(alone, tmp_path, layout):
    path = alone["vae", layout]
    for options in ({}, {"part": "unet"}, {"part": "text_encoder"}):
        with pytest.raises(CheckpointError) as caught:
            convert(path, tmp_path / "x.ckpt", **options)
        assert path.name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_averaged_weights_of_the_unet_are_taken_when_asked_for(tmp_path, tiny_state, tiny_ckpt):
    convert(tiny_ckpt, tmp_path / "x.ckpt", part="unet", weights="ema", precision="fp16")
    read = torch.load(tmp_path / "x.ckpt")["state_dict"]
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(read[name], tiny_state["model_ema.diffusion_modelout2weight"].half())
    assert len(read) == 686


def test_a_part_of_another_family_or_with_surplus_weights_is_refused(tmp_path, tiny_state):
    vae = {name.removeprefix(PREFIXES["vae"]): value for name, value in wanted(tiny_state, "vae").items()}
    path = tmp_path / "x.safetensors"

    def message(state, part):
        safetensors.torch.save_file(state, path)
        with open_checkpoint(path) as file, pytest.raises(CheckpointError) as caught:
            read_part(file, part)
        return str(caught.value)

    assert "has no place for: decoder.mid.more.weight" in message(
        vae | {"decoder.mid.more.weight": torch.ones(1)}, "vae"
    )
    assert "has no text encoder" in message(vae, "text_encoder")
    decoder = {name: value for name, value in vae.items() if name.startswith(("decoder", "post"))}
    assert "lacks the tensor encoder.conv_in.weight" in message(decoder, "vae")
    most = {name: value for name, value in vae.items() if "norm_out.bias" not in name}
    assert "lacks 2 of the 248 weights" in message(most, "vae")
    assert "has no VAE" in message({"x": torch.ones(1)}, "vae")
    assert "it is a LoRA" in message({"lora_unet_x.lora_down.weight": torch.ones(1)}, "vae")
    unet = wanted(tiny_state, "unet")
    wide = {
        name: torch.zeros(value.shape[0], 1024) if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else value
        for name, value in unet.items()
    }
    assert "has a UNet 32 wide; multiples of the 64 of one head are expected" in message(wide, "unet")


def test_a_config_of_a_part_that_its_tensors_do_not_bear_out_is_refused(alone, tmp_path):
    with safe_open(alone["vae", "sd-zoo"], "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(alone["vae", "sd-zoo"])

    def message(**changes):
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata | changes)
        with open_checkpoint(tmp_path / "x.safetensors") as file, pytest.raises(CheckpointError) as caught:
            read_part(file, "vae")
        return str(caught.value)

    config = json.loads(metadata["config"])
    assert "contradicts its tensors" in message(config=json.dumps(config | {"vae": config["vae"] | {"width": 64}}))
    assert r"has \x1b[2J for family" in message(config=json.dumps(config | {"family": "\x1b[2J"}))
    assert message(part="\x1b[2J").isprintable()
    assert "lacks" in message(config=json.dumps(SD_V1.to_dict() | {"vae": config["vae"] | {"residuals_per_level": 3}}))


def test_the_command_takes_one_part(run, tiny_ckpt, tmp_path):
    code, out, err = run("convert", tiny_ckpt, "x.pt", "--only", "vae")
    assert (code, out) == (0, ["x.pt"])
    assert "248 tensors" in err
    assert set(torch.load(tmp_path / "x.pt")) == {"state_dict", "global_step"}
    refused(run("convert", tiny_ckpt, "y.pt", "--only", "unets"), "--only", "unet")
    refused(run("convert", tiny_ckpt, "y.pt", "--only", "vae", "--vae", "x.pt"), "leave out --vae")


def test_a_folder_of_a_part_is_replaced_only_by_that_part(tmp_path, alone, tiny_ckpt):
    folder = tmp_path / "vae"
    convert(alone["vae", "original"], folder, layout="diffusers", part="vae")
    with pytest.raises(TargetError, match="not a folder with a UNet alone"):
        convert(tiny_ckpt, folder, layout="diffusers", part="unet", force=True)
    with pytest.raises(TargetError, match="not a folder with a diffusers model"):
        convert(tiny_ckpt, folder, layout="diffusers", force=True)
    convert(tiny_ckpt, folder, layout="diffusers", part="vae", force=True, precision="bf16")
    assert inspect(folder).precision == "bfloat16"
