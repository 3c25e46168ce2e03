"""Files of Stable Diffusion 2: every name of the published one, both ways, and how it is told what they predict."""

import json

import families
import make_checkpoint
import pytest
import torch
from conftest import refused, rest_slow
from hostile import look
from safetensors.torch import load_file, save_file
from test_convert import same_bits
from test_names import read_manifest

import sd
from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.original_writer import schedule_buffers
from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.files.reader import open_checkpoint
from convert.layouts.names import NEVER_RUN, ema_name, original_names, parameter_shapes
from convert.layouts.noise_schedule import PREDICTS_V, SPREAD_BIAS
from convert.layouts.open_clip import open_clip_names
from convert.single_part import read_part
from sd.config import SD_V1, SD_V2, SD_V2_EDIT, SD_V2_INPAINTING

TINY = make_checkpoint.tiny(SD_V2)


@pytest.fixture(scope="module")
def state():
    return make_checkpoint.made_up_state_dict(TINY, ema=True)


@pytest.fixture
def plain(state):
    """Without averages, and without the marker that tells what it predicts."""
    return {name: value for name, value in state.items() if "model_ema.d" not in name and name != PREDICTS_V}


@pytest.fixture
def path(tmp_path, plain):
    save_file(plain, tmp_path / "v2.safetensors")
    return tmp_path / "v2.safetensors"


@pytest.mark.parametrize("family", [SD_V2, SD_V2_INPAINTING], ids=lambda config: config.family)
def test_every_tensor_of_the_published_file_has_its_place(family):
    """The file for inpainting differs in one shape; that with a depth network is in test_depth_files."""
    manifest = read_manifest("sd-v2.txt")
    manifest["model.diffusion_model.input_blocks.0.0.weight"] = (320, family.unet.in_channels, 3, 3)
    shapes = parameter_shapes(family)
    found = {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(family).items()}
    for name, parts in open_clip_names(family.text_encoder).items():
        of_parts = [found.pop(part) for part in parts]
        found[name] = (sum(shape[0] for shape in of_parts), *of_parts[0][1:])
    beside = make_checkpoint.unused_of_open_clip(family, torch.float32)
    assert all(name.startswith(NEVER_RUN) for name in beside)
    found |= {name: tuple(value.shape) for name, value in beside.items()}
    found |= {name: tuple(value.shape) for name, value in schedule_buffers(family.schedule).items()}
    assert found | {"model_ema.decay": (), "model_ema.num_updates": ()} == manifest


@pytest.mark.slow
@pytest.mark.parametrize("family", [SD_V2, SD_V2_INPAINTING, SD_V2_EDIT], ids=lambda config: config.family)
def test_a_model_is_loaded_with_every_weight_in_its_place(tmp_path, family):
    config = make_checkpoint.tiny(family)
    weights = make_checkpoint.made_up_weights(config, 0)
    make_checkpoint.save_original(tmp_path / "v2.ckpt", make_checkpoint.made_up_state_dict(config))
    model = sd.load(tmp_path / "v2.ckpt", prediction=config.prediction, precision="fp32")
    assert (model.config.family, model.config.text_encoder, model.config.unet) == (
        family.family, config.text_encoder, config.unet,
    )  # fmt: skip
    assert model.tokenizer.pad_token == 0
    for part in ("unet", "vae", "text_encoder"):
        for name, parameter in getattr(model, part).named_parameters():
            assert torch.equal(parameter, weights[f"{part}.{name}"]), name
    inspected = inspect(tmp_path / "v2.ckpt")
    assert (inspected.problem, inspected.family) == (None, family.family)
    assert not any("other" in part.name for part in inspected.leftovers)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["back.safetensors", "back.ckpt"])
def test_original_ours_original_keeps_every_bit(tmp_path, path, plain, container):
    convert(path, tmp_path / "ours.safetensors", prediction="v", keep_all=True, verify=True)
    convert(tmp_path / "ours.safetensors", tmp_path / container, layout="original", verify=True)
    back = tmp_path / container
    back = load_file(back) if back.suffix == ".safetensors" else torch.load(back, weights_only=True)["state_dict"]
    same_bits(back, plain | {PREDICTS_V: torch.empty(0)})


@pytest.mark.slow
def test_half_precision_joins_what_was_apart(tmp_path, path, plain):
    """q, k and v are three tensors in ours, one in the original."""
    convert(path, tmp_path / "ours.safetensors", prediction="v")
    convert(
        tmp_path / "ours.safetensors", tmp_path / "half.safetensors", layout="original", precision="fp16", verify=True
    )
    half = load_file(tmp_path / "half.safetensors")
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(half[name], plain[name].half())


@pytest.mark.slow
def test_a_folder_of_diffusers_and_back(tmp_path, path, plain):
    convert(path, tmp_path / "folder", layout="diffusers", prediction="v", verify=True)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="original", verify=True)
    back = load_file(tmp_path / "back.safetensors")
    unused = {name for name in plain if not name.startswith(("model.", "first_stage_model.", "cond_stage_model."))}
    unused |= set(make_checkpoint.unused_of_open_clip(TINY, torch.float32))
    same_bits(back, {name: value for name, value in plain.items() if name not in unused} | {PREDICTS_V: torch.empty(0)})
    assert inspect(tmp_path / "folder").family == "sd-v2"


@pytest.mark.parametrize("family", rest_slow([SD_V1, SD_V2]), ids=lambda config: config.family)
def test_the_names_of_generative_models_are_read_and_the_originals_are_written(tmp_path, family):
    """Under the names under which a refiner of XL has its text encoder."""
    state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(family))
    theirs = {name.replace("cond_stage_model.", "conditioner.embedders.0."): value for name, value in state.items()}
    save_file(theirs, tmp_path / "sgm.safetensors")
    report = inspect(tmp_path / "sgm.safetensors")
    assert (report.problem, report.family) == (None, family.family)
    assert "conditioner.embedders.0." in report.evidence[0]
    assert {part.name for part in report.components} == {"UNet", "VAE", "text encoder"}
    assert "named as in generative-models, conditioner.embedders.0.*" in look(tmp_path / "sgm.safetensors").notes[0]
    convert(tmp_path / "sgm.safetensors", tmp_path / "ours.safetensors", keep_all=True, verify=True)
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", layout="original")
    same_bits(load_file(tmp_path / "back.safetensors"), state)


REFUSED = {  # what no released command makes pictures with -> the class of its folder, and what is said
    "unclip-l": (
        families.v2(width=32, text_width=32, label=1536),
        "StableUnCLIPPipeline",
        "unCLIP",
        "makes variations of a picture",
    ),
    "unclip-h": (
        families.v2(width=32, text_width=32, label=2048),
        "StableUnCLIPImg2ImgPipeline",
        "unCLIP",
        "makes variations",
    ),
    "upscaler": (
        families.v2(unet=families.UPSCALER_UNET, width=32, text_width=32),
        "StableDiffusionUpscalePipeline",
        "x4 upscaler",
        "enlarges pictures",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_relatives_that_are_not_supported_are_named(tmp_path, run, kind, is_folder):
    shapes, pipeline, *words = REFUSED[kind]
    path = tmp_path / "model"
    if is_folder:
        path.mkdir()
        (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "unet": ["diffusers", "U"]}))
    else:
        vision = {"embedder.model.visual.conv1.weight": (8, 3, 2, 2)} if "unclip" in kind else {}
        state = {name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in (shapes | vision).items()}
        torch.save({"state_dict": state}, path := tmp_path / "model.ckpt")
    for command in (("txt2img", "x", "-m", path), ("convert", path, "x.safetensors")):
        refused(run(*command), *words, "not supported")
    with pytest.raises(UnsupportedFileError, match=words[1]):
        sd.load(path)
    _, out, err = run("inspect", path)
    assert words[0] in "\n".join(out) + err


def spread(plain, value):
    bias = torch.zeros_like(plain[SPREAD_BIAS])
    bias[::2] = 2 * value  # half of them: the standard deviation is the value
    return plain | {SPREAD_BIAS: bias}


@pytest.mark.parametrize(("deviation", "predicts", "native"), [(0.05, "eps", 512), (0.12, "v", 768)])
def test_the_spread_of_a_bias_is_the_last_evidence(tmp_path, plain, run, deviation, predicts, native):
    save_file(spread(plain, deviation), tmp_path / "v2.safetensors")
    report = inspect(tmp_path / "v2.safetensors")
    assert report.prediction == predicts
    assert report.native_size == native
    assert f"native size  {native}x{native} pixels" in "\n".join(run("inspect", tmp_path / "v2.safetensors")[1])
    assert f" {native} " in run("inspect", tmp_path)[1][1]
    assert "a guess" in report.warnings[0]
    other = {"eps": "v", "v": "eps"}[predicts]
    assert f"--prediction {other}" in report.warnings[0]
    assert sd.load(tmp_path / "v2.safetensors").config.native_size == native
    (tmp_path / "v2.yaml").write_text(f"model:\n  params:\n    parameterization: {other}\n")
    assert inspect(tmp_path / "v2.safetensors").prediction == other


@pytest.mark.parametrize(("deviation", "predicts"), [(0.05, "eps"), (0.12, "v")])
def test_the_spread_is_read_in_bfloat16_and_of_averaged_weights(tmp_path, plain, deviation, predicts):
    state = {name: value.bfloat16() for name, value in spread(plain, deviation).items()}
    averaged = {ema_name(name) if name.startswith("model.") else name: value for name, value in state.items()}
    for number, tensors in enumerate([state, averaged]):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        assert look(tmp_path / f"{number}.safetensors").said.prediction == predicts


@pytest.mark.slow
@pytest.mark.parametrize("family", [SD_V2, SD_V2_INPAINTING, SD_V2_EDIT], ids=lambda config: config.family)
def test_openclips_names_tell_version_2_at_every_width(tmp_path, family):
    """Also without what is never run of OpenCLIP, as `sd convert` leaves it out: nothing else has its names here."""
    state = make_checkpoint.made_up_state_dict(config := make_checkpoint.tiny(family))
    unused = make_checkpoint.unused_of_open_clip(config, torch.float32)
    save_file({name: value for name, value in state.items() if name not in unused}, tmp_path / "m.safetensors")
    found = look(tmp_path / "m.safetensors").config
    assert (found.family, found.text_encoder, found.unet.heads) == (
        family.family,
        config.text_encoder,
        config.unet.heads,
    )
    convert(tmp_path / "m.safetensors", tmp_path / "text.safetensors", part="text_encoder")
    with open_checkpoint(tmp_path / "text.safetensors") as file:
        assert read_part(file, "text_encoder").config.text_encoder == config.text_encoder
    alone = {
        name: value for name, value in state.items() if name.startswith("cond_stage_model.") and name not in unused
    }
    save_file(alone, tmp_path / "alone.safetensors")
    with open_checkpoint(tmp_path / "alone.safetensors") as file:
        assert read_part(file, "text_encoder").config.text_encoder == config.text_encoder


def test_unknown_weights_of_the_text_encoder_are_refused(tmp_path, plain):
    save_file(plain | {"cond_stage_model.model.more": torch.ones(2)}, tmp_path / "v2.safetensors")
    with pytest.raises(WeightMismatchError, match="1 weight that an sd-v2 model has no place for: cond_stage_model"):
        sd.load(tmp_path / "v2.safetensors")


def test_a_fused_tensor_without_three_parts_is_refused(tmp_path, plain):
    """Its rows are as many as those of one part, so each of the three would have the right shape."""
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    save_file(plain | {name: torch.ones(TINY.text_encoder.width)}, tmp_path / "v2.safetensors")
    with pytest.raises(WeightMismatchError, match="lacks 3 of"):
        sd.load(tmp_path / "v2.safetensors")
