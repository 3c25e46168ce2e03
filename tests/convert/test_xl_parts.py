"""The text encoders of Stable Diffusion XL, each in a file of its own."""

import json
import math
from dataclasses import replace

import make_checkpoint
import pytest
import safetensors.torch
import torch
from conftest import fill, refused
from oracles import transformers_text_encoder
from safetensors.torch import save_file
from test_convert import same_bits
from transformers import CLIPTextModelWithProjection
from weights_of import stored

from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.target import LAYOUTS
from convert.errors import CheckpointError
from convert.files.reader import open_checkpoint
from convert.layouts.names import text_encoder_parameters
from convert.single_part import read_part
from sd.config import SDXL, SDXL_REFINER

CONFIG, REFINER = make_checkpoint.tiny(SDXL), make_checkpoint.tiny(SDXL_REFINER)
SECOND = "text_encoder_2"


def written(path, config):
    state = make_checkpoint.made_up_state_dict(config)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return written(tmp_path_factory.mktemp("models") / "xl.safetensors", CONFIG)


def target_of(folder, layout, name="part"):
    return folder / (name if layout == "diffusers" else f"{name}.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_second_encoder_goes_into_every_layout_and_back(tmp_path, xl, layout):
    alone = target_of(tmp_path, layout)
    done = convert(xl, alone, layout=layout, part=SECOND, verify=True, hash_source=False)
    assert (done.tensors, done.verified.same) == (53, 53)
    again = tmp_path / "again.safetensors"
    convert(alone, again, layout="sd-zoo", part=SECOND, hash_source=False)
    base, found = stored(xl), safetensors.torch.load_file(again)
    assert found.keys() == {name for name in base if name.startswith(f"{SECOND}.")}
    same_bits(found, {name: base[name] for name in found})
    with open_checkpoint(alone) as file:
        assert read_part(file, SECOND).config.text_encoder_2 == CONFIG.text_encoder_2


def test_a_file_of_it_alone_has_the_names_of_transformers(tmp_path, xl):
    convert(xl, tmp_path / "clip_g.safetensors", layout="original", part=SECOND, hash_source=False)
    found = safetensors.torch.load_file(tmp_path / "clip_g.safetensors")
    theirs = transformers_text_encoder(CONFIG, fill(CONFIG), SECOND).state_dict()
    same_bits(found, {name: value for name, value in theirs.items() if "position_ids" not in name})


def test_a_folder_of_it_alone_is_loaded_by_transformers(tmp_path, xl):
    convert(xl, tmp_path / "part", layout="diffusers", part=SECOND, hash_source=False)
    tokens = torch.arange(77)[None] + 400
    tokens[:, -1] = 49407
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path / "part")(tokens).text_embeds
    assert torch.allclose(fill(CONFIG)[SECOND].encode(tokens)[1], theirs, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_of_the_refiner_is_written_as_the_same_kind(tmp_path, layout):
    alone = target_of(tmp_path, layout)
    convert(written(tmp_path / "refiner.safetensors", REFINER), alone, layout=layout, part="text_encoder")
    if layout == "diffusers":
        assert json.loads((alone / "config.json").read_text())["architectures"] == ["CLIPTextModelWithProjection"]
        alone /= "model.safetensors"
    names = safetensors.torch.load_file(alone).keys()
    assert len(names) == 53
    assert {"sd-zoo": "text_encoder.projection.weight"}.get(layout, "text_projection.weight") in names


def sparse(path, text):
    """A text encoder at full width under transformers' names, whose numbers take no space on the disk."""
    header, place = {}, 0
    for _, _, name, shape in text_encoder_parameters(text):
        size = 2 * math.prod(shape)
        name = name if name.startswith("text_projection") else f"text_model.{name}"
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    packed = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + place)
    return path


FULL = {  # width of a text encoder -> the part that it is, and the one that it is not
    "clip_g": (SDXL.text_encoder_2, SECOND, "text_encoder", "1280 wide, the second one of Stable Diffusion XL"),
    "clip_l": (SDXL.text_encoder, "text_encoder", SECOND, "768 wide, that of Stable Diffusion 1"),
}


@pytest.mark.parametrize("name", FULL)
def test_the_width_tells_which_encoder_a_file_holds(tmp_path, name):
    text, part, other, said = FULL[name]
    path = sparse(tmp_path / f"{name}.safetensors", replace(text, layers=2))
    assert inspect(path).part == part
    with open_checkpoint(path) as file:
        assert read_part(file, part).part == part
        with pytest.raises(CheckpointError, match=f"{said}. Give --only {part}$"):
            read_part(file, other)


def test_what_is_not_there_is_said(tmp_path, xl, tiny_ckpt, run):
    target = tmp_path / "x.safetensors"
    refused(run("convert", tiny_ckpt, target, "--only", SECOND), "is an sd-v1 model, which has no second text encoder.")
    for layout, said in (("sd-zoo", "holds a UNet alone and no second"), ("original", "has no second text encoder of")):
        convert(xl, tmp_path / "unet.safetensors", layout=layout, part="unet", hash_source=False, force=True)
        refused(run("convert", tmp_path / "unet.safetensors", target, "--only", SECOND), said)
    convert(xl, tmp_path / "clip_g", layout="diffusers", part=SECOND, hash_source=False)
    refused(run("convert", tmp_path / "clip_g", target), "sd convert --only takes text_encoder_2.")
    assert inspect(tmp_path / "clip_g").part == SECOND
