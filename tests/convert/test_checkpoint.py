"""Which model is in a file, and what is said where it is another one or not all there."""

import time
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from convert.actions.original_writer import schedule_buffers
from convert.checkpoint import POSITION_IDS, match_shapes, read_checkpoint
from convert.errors import CheckpointError, UnsupportedFileError, WeightMismatchError
from convert.families.family import recognise
from convert.files.reader import open_checkpoint
from convert.layouts.names import original_names
from sd.config import SD_V1, SD_V1_EDIT, SD_V1_INPAINTING
from sd.networks.build import build_networks, parameter_shapes

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
NORM = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"


@pytest.fixture
def look(tmp_path):
    """Write tensors to a file and look at it as loading does."""

    def look(state, *, weights="auto", name="x.safetensors"):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save(state, path)
        with open_checkpoint(path) as file:
            checkpoint = read_checkpoint(file, weights=weights)
            return match_shapes(checkpoint, parameter_shapes(build_networks(checkpoint.config)))

    return look


@pytest.fixture
def state(plain):
    """Without the averaged weights."""
    return plain


def refused(look, state, kind, *parts, **options):
    with pytest.raises(kind) as caught:
        look(state, **options)
    for part in ("x.", *parts):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def original_shapes(config):
    shapes = parameter_shapes(build_networks(config))
    return {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(config).items()}


@pytest.mark.parametrize("family", [SD_V1, SD_V1_INPAINTING, SD_V1_EDIT])
@pytest.mark.parametrize("size", [lambda config: config, make_checkpoint.tiny])
def test_family_and_every_width_come_from_the_shapes(family, size):
    config = size(family)
    assert recognise(original_shapes(config)) == config


def test_other_depths_and_multipliers_are_recognised():
    unet = replace(TINY.unet, width=64, multipliers=(1, 2, 3), depths=(1, 0, 2), middle_depth=3, heads=(8, 8, 8))
    vae = replace(TINY.vae, width=64, multipliers=(1, 2), residuals_per_level=3)
    text = replace(TINY.text_encoder, layers=5, hidden_width=96, context_length=40)
    config = replace(TINY, unet=replace(unet, residuals_per_level=1), vae=vae, text_encoder=text)
    assert recognise(original_shapes(config)) == config


def test_every_tensor_is_the_one_of_its_original_name(look, state):
    checkpoint = look(state)
    assert checkpoint.config == TINY
    assert checkpoint.weights == "model"
    assert checkpoint.other_weights is None
    assert checkpoint.unknown == ()
    assert {checkpoint.names[ours].name for ours in checkpoint.tensors} == set(state) - {
        *schedule_buffers(TINY.schedule),
        "model_ema.decay",
        "model_ema.num_updates",
        POSITION_IDS,
    }


def test_the_training_step_and_the_native_size_beside_the_weights_are_read(look, state):
    found = look({"state_dict": {"state_dict": state}, "global_step": 17, "native_size": 256}, name="x.ckpt")
    assert (found.global_step, found.config) == (17, replace(TINY, native_size=256))


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 56, 4104, -64, 256.0, True, "256", None, 10**30])
def test_a_native_size_that_no_picture_has_is_left_aside(look, state, size):
    assert look({"state_dict": state, "native_size": size}, name="x.ckpt").config == TINY


@pytest.mark.parametrize(("scale", "counts"), [(4.0, True), (0.0, True), (-1.0, False), (101.0, False), (4, False)])
def test_a_guidance_scale_beside_the_weights_is_read_if_it_can_be_one(look, state, scale, counts):
    found = look({"state_dict": state, "guidance_scale": scale}, name="x.ckpt")
    assert found.config == (replace(TINY, guidance_scale=scale) if counts else TINY)


@pytest.mark.parametrize(
    ("scale", "counts"), [("4.5", True), ("4", True), ("-1.0", False), ("nan", False), ("a lot", False), ("", False)]
)
def test_a_guidance_scale_in_the_metadata_is_read_if_it_can_be_one(tmp_path, state, scale, counts):
    path = tmp_path / "x.safetensors"
    save_file(state, path, {"format": "pt", "guidance_scale": scale, "native_size": "9" * 5000})
    with open_checkpoint(path) as file:
        found = read_checkpoint(file).config
    assert found == (replace(TINY, guidance_scale=float(scale)) if counts else TINY)


def test_weights_that_are_wrapped_in_themselves_are_refused(look, state):
    cyclic = {}
    cyclic["state_dict"] = cyclic
    refused(look, cyclic, UnsupportedFileError, "more than 4 dictionaries", name="x.ckpt")
    wrapped = state
    for _ in range(4):
        wrapped = {"state_dict": wrapped}
    assert look(wrapped, name="x.ckpt").config == TINY
    refused(look, {"state_dict": wrapped}, UnsupportedFileError, "more than 4 dictionaries", name="x.ckpt")


def test_averaged_weights_are_taken_when_asked_for(look, tiny_state):
    plain, averaged = look(tiny_state), look(tiny_state, weights="ema")
    assert (plain.weights, plain.other_weights) == ("model", "ema")
    assert (averaged.weights, averaged.other_weights) == ("ema", "model")
    assert averaged.tensors["unet.out.conv.weight"].storage.key == "model_ema.diffusion_modelout2weight"
    assert plain.tensors["unet.out.conv.weight"].storage.key == "model.diffusion_model.out.2.weight"
    assert averaged.tensors["vae.encoder.conv_in.weight"] == plain.tensors["vae.encoder.conv_in.weight"]


def test_averaged_weights_that_are_not_there_are_refused(look, state):
    refused(look, state, WeightMismatchError, "has no EMA weights", "--weights model", weights="ema")


def test_half_of_the_averaged_weights_are_refused(look, tiny_state):
    half = {name: value for name, value in tiny_state.items() if "model_ema.diffusion_modelout" not in name}
    refused(look, half, WeightMismatchError, "lacks ", " weights: model_ema.diffusion_model", weights="ema")
    assert look(half).other_weights is None


def test_an_averaged_weight_too_many_matters_only_where_the_averaged_ones_are_used(look, tiny_state):
    more = {**tiny_state, "model_ema.something\x1b[2J": torch.zeros(1)}
    checkpoint = look(more, name="x.ckpt")
    assert (checkpoint.weights, checkpoint.other_weights, checkpoint.unknown) == ("model", None, ())
    message = r"holds 1 EMA weight of which its UNet has no plain ones: model_ema.something\x1b[2J"
    refused(look, more, WeightMismatchError, message, weights="ema", name="x.ckpt")


@pytest.mark.parametrize(
    "name", ["loss.logvar", "first_stage_model.loss.discriminator.weight", "first_stage_model.model_ema.decay"]
)
def test_leftovers_of_the_training_of_a_vae_are_left_aside(look, state, name):
    checkpoint = look({**state, name: torch.zeros(2)})
    assert checkpoint.unknown == ()
    assert len(checkpoint.tensors) == 970


def test_a_missing_weight_is_named(look, state):
    del state[NORM]
    refused(look, state, WeightMismatchError, "lacks 1 of the 970 weights", NORM)


def test_a_surplus_weight_is_named(look, state):
    surplus = "model.diffusion_model.time_embed.4.weight"
    refused(look, {**state, surplus: torch.zeros(2)}, WeightMismatchError, "holds 1 weight that", surplus)


def test_a_weight_of_another_shape_is_named_with_both_shapes(look, state):
    wrong = {**state, NORM: torch.zeros(33)}
    refused(look, wrong, WeightMismatchError, f"{NORM} has the shape [33], expected [32]")


def test_a_transposed_weight_is_refused(look, state):
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    wrong = {**state, name: state[name].T.contiguous()}
    refused(look, wrong, WeightMismatchError, "mlp.fc1.weight has the shape")


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64"])
def test_weights_that_are_no_real_numbers_are_refused(look, state, dtype):
    wrong = {**state, NORM: torch.ones(32, dtype=getattr(torch, dtype))}
    refused(look, wrong, WeightMismatchError, f"{NORM} holds {dtype} numbers")


def test_parts_that_do_not_belong_together_are_refused(look, state):
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    refused(look, {**state, name: torch.zeros(32, 128)}, WeightMismatchError, "128 wide", "gives 64")


def test_an_added_word_in_the_token_embedding_is_refused(look, state):
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    refused(look, {**state, name: torch.zeros(49409, 64)}, WeightMismatchError, "49409 rows", "added words")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.{}.0.in_layers.2.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.{}.x",
        "model.diffusion_model.middle_block.1.transformer_blocks.{}.x",
        "first_stage_model.encoder.down.{}.block.0.conv1.weight",
        "first_stage_model.encoder.down.0.block.{}.x",
        "cond_stage_model.transformer.text_model.encoder.layers.{}.x",
    ],
)
def test_a_hundred_thousand_blocks_are_refused_at_once(name):
    shapes = {name.format(index): (32, 32, 3, 3) for index in range(1, 100_000)} | original_shapes(TINY)
    start = time.process_time()
    with pytest.raises(WeightMismatchError) as caught:
        recognise(shapes)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"residuals_per_level": 9}, "has 9 UNet residuals per level; 1 to 8 can be used"),
        ("unet", {"middle_depth": 33}, "has 33 transformer blocks in the middle; 0 to 32"),
        ("unet", {"depths": (33, 1, 1, 0)}, "has 33 transformer blocks per residual; 0 to 32"),
        ("vae", {"residuals_per_level": 9}, "has 9 VAE residuals per level"),
        ("vae", {"multipliers": (1,) * 9}, "has 9 VAE levels"),
        ("text_encoder", {"layers": 129}, "has 129 text encoder layers; 1 to 128"),
    ],
)
def test_more_repeats_than_any_model_has_are_refused(part, change, words):
    config = replace(TINY, **{part: replace(getattr(TINY, part), **change)})
    with pytest.raises(WeightMismatchError, match=words):
        recognise(original_shapes(config))


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        (CONV_IN, (32,), "4 axes are expected"),
        (CONV_IN, (33, 4, 3, 3), "has a UNet whose levels have"),
        (CONV_IN, (32, 7, 3, 3), "takes 7 channels"),
        (CONV_IN, (0, 4, 3, 3), "none of them 0"),
        (CONV_IN.replace("0.0", "1.0.in_layers.2"), (), "4 axes are expected"),
        ("first_stage_model.encoder.conv_in.weight", (31, 3, 3, 3), "has a VAE whose levels have"),
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", (49408, 65), "65"),
    ],
)
def test_sizes_that_no_model_has_are_refused(look, state, name, shape, part):
    refused(look, {**state, name: torch.zeros(shape)}, CheckpointError, part)
