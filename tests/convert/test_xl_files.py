"""Files of Stable Diffusion XL: every name of the published ones, both ways."""

import json
import shutil
from math import prod

import make_checkpoint
import pytest
import torch
from conftest import fill
from hostile import look
from oracles import diffusers_unet, transformers_text_encoder
from safetensors.torch import load_file, save_file
from test_convert import same_bits
from test_names import read_manifest

import sd
from convert.actions.convert import convert
from convert.actions.diffusers_writer import folder_settings
from convert.actions.inspect import inspect
from convert.errors import CheckpointError, WeightMismatchError
from convert.families.diffusers_config import with_settings
from convert.families.table import row_named
from convert.files.records import StorageRecord, TensorRecord
from convert.layouts.joined import is_transposed, joined_names
from convert.layouts.names import ema_name, original_names, parameter_shapes, text_places
from convert.layouts.open_clip import as_clip
from sd.config import SDXL, SDXL_INPAINTING, SDXL_REFINER
from sd.text.tokenizer import Tokenizer

FAMILIES = [SDXL, SDXL_INPAINTING, SDXL_REFINER]
NARROW = {config.family: make_checkpoint.tiny(config) for config in FAMILIES}
LABEL = "model.diffusion_model.label_emb.0.0.weight"
SIGMAS, FIRST_CONV = "denoiser.sigmas", "model.diffusion_model.input_blocks.0.0.weight"
BESIDE = {  # in the published files, and no weights
    "sdxl": {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids", SIGMAS}
    | {"conditioner.embedders.1.model.logit_scale"},
    "sdxl-refiner": {"conditioner.embedders.0.model.logit_scale", SIGMAS},
}
BESIDE["sdxl-inpainting"] = BESIDE["sdxl"]


def manifest(config):
    if config.unet.in_channels == 4:
        return read_manifest({"sdxl": "sdxl-base.txt"}.get(config.family, f"{config.family}.txt"))
    return read_manifest("sdxl-base.txt") | {FIRST_CONV: (320, 9, 3, 3)}  # as no original file exists


@pytest.fixture(autouse=True)
def _files_are_removed(tmp_path):
    yield
    shutil.rmtree(tmp_path)


def by_family(function):
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda config: config.family)(function)


@by_family
def test_every_tensor_of_the_published_file_has_its_place(family):
    shapes = parameter_shapes(family)
    found = {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(family).items()}
    for name, parts in joined_names(family).items():
        of_parts = [found.pop(part) for part in parts]
        joined = (sum(shape[0] for shape in of_parts), *of_parts[0][1:])
        found[name] = joined[::-1] if is_transposed(name) else joined
    published = manifest(family)
    assert BESIDE[family.family] == published.keys() - found.keys()
    assert found == {name: shape for name, shape in published.items() if name in found}


@by_family
def test_every_tensor_of_the_published_file_is_read_as_a_weight(family):
    """And each weight of ours is there once, in its shape."""
    storage = StorageRecord("", 0, 0, "little", None)

    def record(shape):
        return TensorRecord("float16", shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))), storage, 0)

    records = {name: record(shape) for name, shape in manifest(family).items()}
    read = {clip: record.shape for _, clip, record in as_clip(records)}
    shapes = parameter_shapes(family)
    expected = {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(family).items()}
    assert {name: read[name] for name in expected} == expected
    assert read.keys() - expected.keys() == BESIDE[family.family]


def test_the_published_half_precision_files_have_their_sizes():
    """The header of 2,515 names is part of the size: base as it is shared, in float16 without the sigmas."""
    tensors = {name: shape for name, shape in manifest(SDXL).items() if name != SIGMAS}
    assert len(tensors) == 2515
    assert 2 * sum(map(prod, tensors.values())) + header_bytes(tensors) == 6_938_040_682


def header_bytes(shapes):
    """Of a safetensors file whose tensors are all float16, in this order."""
    entries, start = {}, 0
    for name, shape in sorted(shapes.items()):
        end = start + 2 * prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(entries, separators=(",", ":")))
    return 8 + length + -length % 8


@by_family
def test_a_made_up_file_has_the_published_names(family):
    config = NARROW[family.family]
    state = make_checkpoint.made_up_state_dict(config)
    depths = "transformer_blocks."
    published = {name for name in manifest(family) if not _deep(name)}
    assert {name for name in state if not _deep(name)} == published
    assert any(depths in name for name in state)
    root = "conditioner.embedders.1.model." if config.text_encoder_2 else "conditioner.embedders.0.model."
    assert state[f"{root}text_projection"].shape == (64, 64)


def _deep(name):
    """In what narrow models do not have: a layer, a change of width."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    layered = any(part in name for part in ("resblocks.", "encoder.layers."))
    inner = name.partition("transformer_blocks.")[2].partition(".")[0]
    if "input_blocks.7.0.skip_connection." in name:  # where the number of channels changes
        return True
    return (layered and numbers[1] > 2) or (inner.isdecimal() and int(inner) > 1)


FOLDERS = {
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpainting": "StableDiffusionXLInpaintPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}


@pytest.mark.slow
@by_family
def test_a_folder_loads_in_the_library_and_comes_back(tmp_path, states, family):
    import diffusers

    config, state = NARROW[family.family], states[family.family]
    save_file(contiguous(state), tmp_path / "xl.safetensors")
    convert(tmp_path / "xl.safetensors", tmp_path / "folder", layout="diffusers", verify=True)
    assert look(tmp_path / "folder").config == config
    pipeline = getattr(diffusers, FOLDERS[family.family]).from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(pipeline).__name__ == json.loads((tmp_path / "folder/model_index.json").read_text())["_class_name"]
    networks = fill(config)
    theirs = diffusers_unet(config, networks).state_dict()
    same_bits(pipeline.unet.state_dict(), theirs)
    for part, place in text_places(config).items():
        mine = transformers_text_encoder(config, networks, part).state_dict()
        same_bits(getattr(pipeline, place.folder).state_dict(), mine)
        tokenizer = getattr(pipeline, place.folder.replace("text_encoder", "tokenizer"))
        ids = Tokenizer(pad_token=getattr(config, part).pad_token)("a cat")[0]
        assert tokenizer("a cat", padding="max_length")["input_ids"] == ids.tolist()
    pipeline.save_pretrained(tmp_path / "saved")  # as the library writes it
    for folder in ("folder", "saved"):
        back = tmp_path / f"{folder}.safetensors"
        convert(tmp_path / folder, back, layout="original", verify=True)
        same_bits(load_file(back), {name: value for name, value in state.items() if name not in BESIDE[family.family]})


@pytest.mark.parametrize(("family", "stated"), [("sdxl", [1, 2, 2]), ("sdxl", [2, 2, 2]), ("sdxl-refiner", 2)])
def test_depths_of_levels_without_attention_do_not_matter(family, stated):
    """Published folders of the base say [1, 2, 10] and of the refiner 4, for levels that have none as well."""
    config = NARROW[family]
    settings = {name.partition("/")[0]: values for name, values in folder_settings(config).items() if "config" in name}
    settings["unet"] = {**settings["unet"], "transformer_layers_per_block": stated}
    assert with_settings(config, settings) == config
    settings["unet"]["transformer_layers_per_block"] = 3
    with pytest.raises(WeightMismatchError, match="transformer_layers_per_block"):
        with_settings(config, settings)


@pytest.fixture(scope="module")
def states():
    return {name: make_checkpoint.made_up_state_dict(config) for name, config in NARROW.items()}


@pytest.mark.slow
@by_family
def test_a_model_is_loaded_with_every_weight_in_its_place(tmp_path, states, family):
    config = NARROW[family.family]
    weights = make_checkpoint.made_up_weights(config, 0)
    save_file(contiguous(states[family.family]), tmp_path / "xl.safetensors")
    model = sd.load(tmp_path / "xl.safetensors", precision="fp32")
    assert model.config == config
    parts = ["unet", "vae", "text_encoder", "text_encoder_2"][: 3 + bool(config.text_encoder_2)]
    for part in parts:
        for name, parameter in getattr(model, part).named_parameters():
            assert torch.equal(parameter, weights[f"{part}.{name}"]), name
    report = inspect(tmp_path / "xl.safetensors")
    assert (report.problem, report.family) == (None, family.family)
    assert look(tmp_path / "xl.safetensors").notes == ()
    assert not any("other" in part.name for part in report.leftovers)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["back.safetensors", "back.ckpt"])
@pytest.mark.parametrize("family", ["sdxl", "sdxl-refiner"])
def test_original_ours_original_keeps_every_bit(tmp_path, states, family, container):
    save_file(contiguous(states[family]), tmp_path / "xl.safetensors")
    convert(tmp_path / "xl.safetensors", tmp_path / "ours.safetensors", keep_all=True, verify=True)
    convert(tmp_path / "ours.safetensors", tmp_path / container, layout="original", verify=True)
    back = tmp_path / container
    back = load_file(back) if back.suffix == ".safetensors" else torch.load(back, weights_only=True)["state_dict"]
    same_bits(back, states[family])


@pytest.mark.slow
def test_half_precision_with_averaged_weights(tmp_path):
    """Joined and transposed tensors change their precision; the averages of the UNet are found by their names."""
    config = NARROW["sdxl"]
    state = make_checkpoint.made_up_state_dict(config, ema=True)
    save_file(contiguous(state), tmp_path / "xl.safetensors")
    convert(tmp_path / "xl.safetensors", tmp_path / "half.safetensors", weights="ema", precision="fp16")
    convert(tmp_path / "half.safetensors", tmp_path / "back.safetensors", layout="original", verify=True)
    back = load_file(tmp_path / "back.safetensors")
    for name in ("transformer.resblocks.0.attn.in_proj_weight", "text_projection"):
        name = f"conditioner.embedders.1.model.{name}"
        assert torch.equal(back[name], state[name].half())
    assert torch.equal(back[LABEL], state[ema_name(LABEL)].half())
    plain = {name: value for name, value in state.items() if not name.startswith("model.")}
    save_file(contiguous(plain), tmp_path / "averaged.safetensors")
    assert inspect(tmp_path / "averaged.safetensors").problem is None


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sdxl-refiner", marks=pytest.mark.slow)])
def test_files_of_ours_and_folders_are_named_by_what_they_state(tmp_path, states, family):
    """Where names and shapes, of a narrow model, would mean another family."""
    save_file(contiguous(states[family]), tmp_path / "xl.safetensors")
    title = inspect(tmp_path / "xl.safetensors").kind
    for target, layout in (("ours.safetensors", "sd-zoo"), ("folder", "diffusers")):
        convert(tmp_path / "xl.safetensors", tmp_path / target, layout=layout, hash_source=False)
        assert inspect(tmp_path / target).kind == title


def test_the_vae_of_another_family_is_refused(tmp_path, states, tiny_ckpt):
    """A whole checkpoint tells which scale its latents have; a VAE alone does not."""
    save_file(contiguous(states["sdxl"]), tmp_path / "xl.safetensors")
    with pytest.raises(WeightMismatchError, match=r"latent scale 0\.18215.*whose scale is 0\.13025"):
        convert(tmp_path / "xl.safetensors", tmp_path / "x.safetensors", vae=tiny_ckpt)
    with pytest.raises(WeightMismatchError, match=r"latent scale 0\.13025.*whose scale is 0\.18215"):
        convert(tiny_ckpt, tmp_path / "x.safetensors", vae=tmp_path / "xl.safetensors")


@by_family
def test_a_unet_alone_is_told_by_the_vector_that_it_takes(tmp_path, states, family):
    """At any width, so that what sd convert --only writes can be read again."""
    unet = {name: value for name, value in states[family.family].items() if name.startswith("model.diffusion_model.")}
    save_file(contiguous(unet), tmp_path / "unet.safetensors")
    report = inspect(tmp_path / "unet.safetensors")
    assert (report.part, report.layout) == ("unet", "original")
    assert row_named(family.family).title in report.kind
    convert(tmp_path / "unet.safetensors", tmp_path / "ours.safetensors", part="unet")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", part="unet", layout="original")
    same_bits(load_file(tmp_path / "back.safetensors"), unet)


FAULTS = {
    "a text encoder is missing": (lambda name: not name.startswith("conditioner.embedders.1."), "lacks"),
    "a second bias": (lambda name: "label_emb.0.2.bias" not in name, "lacks 1 of"),
    "a weight is missing": (lambda name: name != "conditioner.embedders.1.model.ln_final.bias", "lacks 1 of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_incomplete_files_are_refused(tmp_path, states, fault):
    keeps, words = FAULTS[fault]
    save_file({n: v.contiguous() for n, v in states["sdxl"].items() if keeps(n)}, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match=words):
        sd.load(tmp_path / "xl.safetensors")


def test_a_file_with_the_text_encoder_of_version_1_beside_its_own_is_refused(tmp_path, states):
    """Both would be its first one; which of them was read depended on their order."""
    name = "embeddings.position_embedding.weight"
    both = {f"{start}.transformer.text_model.{name}" for start in ("conditioner.embedders.0", "cond_stage_model")}
    more = {name: torch.zeros(77, 64) for name in both}
    save_file(contiguous(states["sdxl"] | more), tmp_path / "xl.safetensors")
    with pytest.raises(WeightMismatchError, match=r"twice, as .*\. It is unclear which of the two counts") as error:
        look(tmp_path / "xl.safetensors")
    assert all(each in str(error.value) for each in both)


def test_parts_that_do_not_belong_together_are_refused(tmp_path, states):
    narrower = {LABEL: states["sdxl"][LABEL][:, :-256]}
    save_file(contiguous(states["sdxl"] | narrower), tmp_path / "xl.safetensors")
    with pytest.raises(WeightMismatchError, match="given 1344 numbers beside the text, of which 1536 are sizes"):
        sd.load(tmp_path / "xl.safetensors")
    surplus = {"conditioner.embedders.1.model.more": torch.ones(2)}
    save_file(contiguous(states["sdxl"] | surplus), tmp_path / "xl.safetensors")
    with pytest.raises(WeightMismatchError, match=r"1 weight that an sdxl .*: conditioner\.embedders\.1\.model\.more"):
        sd.load(tmp_path / "xl.safetensors")


def contiguous(state):
    return {name: value.contiguous() for name, value in state.items()}
