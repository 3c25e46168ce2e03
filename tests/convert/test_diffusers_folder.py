"""Folders of the diffusers library: what it writes we read, what we write it reads, and the numbers are the same."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import make_checkpoint
import oracles
import pytest
import safetensors.torch
import torch
from conftest import TINY, fill
from diffusers import StableDiffusionPipeline
from hostile import look, refused_model, touch
from test_convert import same_bits
from weights_of import equal, parameters

import sd
from convert.actions.convert import TargetError, convert
from convert.actions.diffusers_writer import folder_settings
from convert.checkpoint import read_checkpoint
from convert.errors import (
    CorruptFileError,
    UnsafeFileError,
    UnsupportedFileError,
    WeightMismatchError,
)
from convert.families.diffusers_config import with_settings
from convert.files.reader import open_checkpoint
from convert.layouts.names import diffusers_names, original_names
from sd.app.cli import main
from sd.config import SD_V1

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
WEIGHTS = {original.name for original in original_names(TINY).values()}


@pytest.fixture(scope="module")
def networks():
    return fill(TINY)


@pytest.fixture(scope="module")
def expected(networks):
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, networks):
    """A folder that the library itself has written."""
    with torch.no_grad():
        folder = tmp_path_factory.mktemp("theirs") / "model"
        oracles.diffusers_pipeline(TINY, networks).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, theirs):
    """The same model in a folder that we have written."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    convert(theirs, folder, layout="diffusers")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def copy(tmp_path, ours):
    """A folder that a test may change; its weights are links."""
    folder = tmp_path / "model"
    shutil.copytree(ours, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in (UNET, VAE, TEXT):
        os.link(ours / name, folder / name)
    return folder


def edit(path, **changes):
    """Change settings in a JSON file; ... takes one out."""
    settings = json.loads(path.read_text())
    settings |= changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}))


def rewrite(path, change):
    """Replace a file of weights by another one made from its tensors."""
    tensors = change(safetensors.torch.load_file(path))
    path.unlink()
    safetensors.torch.save_file(tensors, path)


# Reading what the library writes


@pytest.mark.slow
def test_every_weight_of_a_saved_pipeline_is_the_one_it_was(theirs, expected):
    model = sd.load(theirs, precision="fp32")
    equal(parameters(model), expected)
    assert model.config == replace(TINY, native_size=512)
    assert model.source.name == "model"
    assert not any(name.startswith("text_model.") for name in safetensors.torch.load_file(theirs / TEXT))  # ours do


@pytest.mark.slow
def test_a_folder_of_pickles_is_read_too(tmp_path, networks, expected):
    oracles.diffusers_pipeline(TINY, networks).save_pretrained(tmp_path / "model", safe_serialization=False)
    names = {path.name for path in (tmp_path / "model").rglob("*.bin")}
    assert "diffusion_pytorch_model.bin" in names
    equal(parameters(sd.load(tmp_path / "model", precision="fp32")), expected)


@pytest.mark.slow
def test_a_folder_of_half_precision_files_alone_is_read(tmp_path, networks, expected):
    pipeline = oracles.diffusers_pipeline(TINY, networks)
    pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    equal(parameters(sd.load(tmp_path / "model", precision="fp32")), expected)


def test_full_precision_is_read_where_there_is_half_precision_as_well(copy, expected):
    for name in (UNET, VAE):
        tensors = safetensors.torch.load_file(copy / name)
        half = {key: value.half() for key, value in tensors.items()}
        safetensors.torch.save_file(half, copy / name.replace(".safetensors", ".fp16.safetensors"))
    equal(parameters(sd.load(copy, precision="fp32")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_read(tmp_path, networks, expected, variant):
    pipeline = oracles.diffusers_pipeline(TINY, networks)
    pipeline.save_pretrained(tmp_path / "model", variant=variant, max_shard_size="3MB")
    assert len(list((tmp_path / "model/unet").glob("*.safetensors"))) > 2
    assert len(list((tmp_path / "model/unet").glob("*.index*.json"))) == 1
    equal(parameters(sd.load(tmp_path / "model", precision="fp32")), expected)


def test_attention_names_of_the_vae_before_diffusers_0_17_are_read(copy, expected):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        renamed = {}
        for name, value in tensors.items():
            for new, before in old.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            renamed[name] = value
        assert sum(".proj_attn." in name for name in renamed) == 4
        return renamed

    rewrite(copy / VAE, rename)
    equal(parameters(sd.load(copy, precision="fp32")), expected)


def test_position_ids_of_older_folders_are_no_weight(copy, expected):
    rewrite(copy / TEXT, lambda tensors: tensors | {"text_model.embeddings.position_ids": torch.arange(77.0)[None]})
    assert look(copy).unknown == ()
    equal(parameters(sd.load(copy, precision="fp32")), expected)


def test_links_into_a_cache_are_followed(copy, expected):
    blob = copy.parent / "blob"
    os.rename(copy / UNET, blob)
    (copy / UNET).symlink_to(os.path.relpath(blob, copy / "unet"))
    equal(parameters(sd.load(copy, precision="fp32")), expected)
    blob.unlink()
    refused_model(
        copy, UnsupportedFileError, "model/unet/diffusion_pytorch_model.safetensors is a link to ../../blob, which"
    )


@pytest.mark.parametrize("prefix", ["text_encoder.", "te."])
def test_a_whole_model_with_these_names_in_one_file_is_read(tmp_path, ours, expected, prefix):
    parts = {"unet.": UNET, "vae.": VAE, prefix: TEXT}
    state = {
        start + name: value
        for start, place in parts.items()
        for name, value in safetensors.torch.load_file(ours / place).items()
    }
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    equal(parameters(sd.load(tmp_path / "x.safetensors", precision="fp32")), expected)


# Settings


def test_what_no_shape_tells_comes_from_the_settings(copy):
    edit(copy / "unet/config.json", attention_head_dim=[1, 2, 4, 8], sample_size=32)
    edit(copy / "vae/config.json", scaling_factor=0.25)
    edit(copy / "text_encoder/config.json", num_attention_heads=2, hidden_act="gelu")
    schedule = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.01, "prediction_type": "v_prediction"}
    edit(copy / "scheduler/scheduler_config.json", **schedule)
    config = look(copy).config
    assert config.unet.heads == (1, 2, 4, 8)
    assert config.native_size == 256
    assert config.vae.latent_scale == 0.25
    assert (config.text_encoder.heads, config.text_encoder.activation) == (2, "gelu")
    assert (config.schedule.timesteps, config.schedule.beta_start, config.schedule.beta_end) == (500, 0.001, 0.01)
    assert config.prediction == "v"


def test_settings_that_are_left_out_have_the_library_s_defaults(copy):
    edit(copy / "vae/config.json", scaling_factor=...)
    edit(copy / "unet/config.json", attention_head_dim=..., use_linear_projection=..., mid_block_type=...)
    edit(copy / "text_encoder/config.json", hidden_act=..., num_attention_heads=...)
    assert look(copy).config == TINY
    shutil.rmtree(copy / "scheduler")
    assert look(copy).config == TINY


@pytest.mark.parametrize("config", [SD_V1, TINY, replace(TINY, prediction="v", native_size=768)])
def test_written_settings_are_read_as_the_same_config(config):
    places = {"unet": "unet/config.json", "vae": "vae/config.json", "text_encoder": "text_encoder/config.json"}
    places["scheduler"] = "scheduler/scheduler_config.json"
    written = json.loads(json.dumps(folder_settings(config)))
    shapes_tell = replace(config, prediction="eps", native_size=512)
    assert with_settings(shapes_tell, {name: written[place] for name, place in places.items()}) == config


CANNOT_FOLLOW = {  # changed settings, and what is said of them
    "unet/config.json": [
        ({"use_linear_projection": True}, UnsupportedFileError, "use_linear_projection = True"),
        ({"act_fn": "gelu"}, UnsupportedFileError, "act_fn = gelu; only networks with silu"),
        ({"new_thing": "yes\x1b[2J"}, UnsupportedFileError, r"unknown setting: new_thing = yes\x"),
        ({"cross_attention_dim": 1024}, WeightMismatchError, "cross_attention_dim is 1024"),
        ({"block_out_channels": [32, 64]}, WeightMismatchError, "block_out_channels is [32, 64]"),
        ({"attention_head_dim": 5}, WeightMismatchError, "32 wide with 5 attention heads"),
        ({"attention_head_dim": [8, 8]}, WeightMismatchError, "2 numbers of attention heads"),
        ({"attention_head_dim": "8"}, WeightMismatchError, "must divide"),
        ({"attention_head_dim": 0}, WeightMismatchError, "must divide"),
        ({"norm_num_groups": 16}, WeightMismatchError, "norm_num_groups is 16, the weights have 32"),
    ],
    "vae/config.json": [
        ({"scaling_factor": "much"}, WeightMismatchError, "much in a config where a number"),
        ({"scaling_factor": -1}, WeightMismatchError, "-1.0 for latent_scale"),
        ({"latents_mean": [0, 0]}, UnsupportedFileError, "latents_mean = [0, 0]"),
        ({"layers_per_block": 3}, WeightMismatchError, "layers_per_block is 3, the weights have 2"),
    ],
    "text_encoder/config.json": [
        ({"num_hidden_layers": 12}, WeightMismatchError, "num_hidden_layers is 12"),
        ({"hidden_act": "relu"}, WeightMismatchError, "relu for activation"),
    ],
    "scheduler/scheduler_config.json": [
        ({"beta_schedule": "linear"}, UnsupportedFileError, "of the kind linear"),
        ({"beta_schedule": ...}, UnsupportedFileError, "of the kind linear"),
        ({"prediction_type": "flow"}, UnsupportedFileError, "predicts flow"),
        ({"prediction_type": []}, UnsupportedFileError, "predicts []"),
        ({"trained_betas": [0.1]}, UnsupportedFileError, "noise levels of its own (trained_betas)"),
        ({"beta_end": 2}, WeightMismatchError, "must rise between 0 and 1"),
        ({"num_train_timesteps": 1e3}, WeightMismatchError, "not a whole number"),
    ],
    "model_index.json": [
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, UnsupportedFileError, "Stable Diffusion XL edit"),
        ({"_class_name": 3}, UnsupportedFileError, "does not name a pipeline"),
        ({"vae": ["diffusers", "VQModel"]}, UnsupportedFileError, "vae of the class VQModel"),
        ({"unet": [None, None]}, UnsupportedFileError, "has no unet in its model_index"),
        ({"text_encoder": ...}, UnsupportedFileError, "has no text_encoder in its model_index"),
    ],
}


@pytest.mark.parametrize("place", CANNOT_FOLLOW)
def test_settings_that_we_cannot_follow_are_refused(copy, place):
    before = (copy / place).read_text()
    for changes, kind, words in CANNOT_FOLLOW[place]:
        edit(copy / place, **changes)
        refused_model(copy, kind, words)
        (copy / place).write_text(before)


# Damage and malice


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"{", CorruptFileError, "vae/config.json that is not JSON"),
        (b"[1]", CorruptFileError, "vae/config.json that holds no settings"),
        (b'{"a": 1, "a": 2}', UnsafeFileError, "the same name twice in vae/config.json"),
        (b"[" * 100_000, CorruptFileError, "not JSON"),
        (b"\xff\xfe{}", CorruptFileError, "not JSON"),
        (b" " * (17 << 20), UnsupportedFileError, "limit for bytes of vae/config.json"),
        (b"version https://git-lfs.github.com/spec/v1\n", UnsupportedFileError, "Git LFS pointer for vae/config.json"),
    ],
)
def test_damaged_settings_are_refused(copy, content, kind, words):
    (copy / "vae/config.json").write_bytes(content)
    refused_model(copy, kind, words)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("place", ["unet/config.json", UNET])
def test_a_pipe_in_a_folder_is_refused_without_waiting_for_it(copy, place):
    (copy / place).unlink()
    os.mkfifo(copy / place)
    refused_model(copy, UnsupportedFileError, place)


@pytest.mark.parametrize("place", ["unet/config.json", UNET])
def test_a_missing_file_is_named(copy, place):
    (copy / place).unlink()
    refused_model(copy, UnsupportedFileError, place, "Download the folder again")


def test_a_folder_of_something_else_is_refused(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    refused_model(tmp_path / "empty", UnsupportedFileError, "is a folder without a model_index.json")
    refused_model(
        copy / "unet",
        UnsupportedFileError,
        "folder of one component (UNet2DConditionModel)",
        "the folder above",
        "--only takes unet",
    )


def test_errors_name_the_file_inside_the_folder(copy):
    data = (copy / UNET).read_bytes()
    (copy / UNET).unlink()
    (copy / UNET).write_bytes(data[:5000])
    refused_model(
        copy, CorruptFileError, "model/unet/diffusion_pytorch_model.safetensors ends after", "download it again"
    )


def test_nothing_in_a_folder_is_run(copy, tmp_path):
    marker = tmp_path / "marker"
    (copy / UNET).unlink()
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(touch(marker)))
    refused_model(copy, UnsafeFileError, "model/unet/diffusion_pytorch_model.bin", "names code")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", ".x.safetensors", "x.bin", ""],
)
def test_an_index_that_points_elsewhere_is_refused(copy, name):
    os.rename(copy / UNET, copy.parent / "x.safetensors")
    index = {"weight_map": {"conv_in.weight": name}}
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused_model(copy, UnsafeFileError, "names a file elsewhere")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda places: places | {"more": "part.safetensors"}, CorruptFileError, "lacks more in unet/part.safetensors"),
        (
            lambda places: {name: place for name, place in places.items() if name != "conv_in.bias"},
            UnsafeFileError,
            "has conv_in.bias in unet/part.safetensors",
        ),
        (lambda places: places | {"a": "b.safetensors"}, UnsupportedFileError, "unet/b.safetensors does not exist"),
        (lambda places: places | {"a": 1}, UnsupportedFileError, "names no files"),
        (lambda places: None, UnsupportedFileError, "names no files"),
        (lambda places: {str(i): f"{i}.safetensors" for i in range(65)}, UnsupportedFileError, "files of one"),
    ],
)
def test_an_index_that_does_not_go_with_its_files_is_refused(copy, change, kind, words):
    os.rename(copy / UNET, copy / "unet/part.safetensors")
    places = dict.fromkeys(safetensors.torch.load_file(copy / "unet/part.safetensors"), "part.safetensors")
    index = copy / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert look(copy).config == TINY
    index.write_text(json.dumps({"weight_map": change(places)}))
    refused_model(copy, kind, words)


def test_missing_and_surplus_weights_are_named_as_the_file_has_them(copy):
    rewrite(copy / VAE, lambda tensors: tensors | {"decoder.more.weight": torch.ones(1)})
    refused_model(copy, WeightMismatchError, "vae.decoder.more.weight")
    rewrite(
        copy / VAE,
        lambda tensors: {n: t for n, t in tensors.items() if "more" not in n and n != "decoder.conv_in.bias"},
    )
    refused_model(copy, WeightMismatchError, "lacks 1 of the 970 weights: first_stage_model.decoder.conv_in.bias")


# Writing


@pytest.mark.slow
def test_the_library_loads_what_we_write_and_gives_the_same_numbers(ours, networks):
    pipeline = StableDiffusionPipeline.from_pretrained(ours, local_files_only=True)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor(501)
    tokens = sd.load(ours).tokenizer(["a horse on the moon", ""])
    context = pipeline.text_encoder(torch.tensor(tokens)).last_hidden_state
    error = oracles.relative_error
    assert error(networks["text_encoder"](torch.tensor(tokens)), context) < 1e-5
    assert error(networks["unet"](x, t, context), pipeline.unet(x, t, context).sample) < 1e-5
    assert error(networks["vae"].decode(x), pipeline.vae.decode(x).sample) < 1e-5
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    assert error(networks["vae"].encode(image)[0], pipeline.vae.encode(image).latent_dist.mean) < 1e-5
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert (pipeline.unet.config.sample_size, pipeline.vae_scale_factor) == (64, 8)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a horse", num_inference_steps=2, width=64, height=64).images[0].size == (64, 64)


def test_our_tokenizer_files_give_the_ids_that_we_give(ours):
    pipeline_tokenizer = oracles.CLIPTokenizer.from_pretrained(ours / "tokenizer", local_files_only=True)
    prompts = ["A photograph of an astronaut, riding a horse!", "naïve café 東京 🏯", "", "x " * 100]
    found = pipeline_tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    assert found == sd.text.tokenizer.Tokenizer()(prompts).tolist()


def test_original_to_diffusers_and_back_gives_the_same_bits(tmp_path, tiny_state, tiny_ckpt):
    done = convert(tiny_ckpt, tmp_path / "folder", layout="diffusers")
    assert (done.layout, done.tensors) == ("diffusers", 970)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="original")
    back = safetensors.torch.load_file(tmp_path / "back.safetensors")
    same_bits(back, {name: tiny_state[name] for name in WEIGHTS})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "folder"]


def test_a_guidance_scale_that_a_folder_has_no_place_for_is_said(run, tmp_path, tiny_state):
    """Of a whole model, that is: one network makes no picture."""
    path = tmp_path / "own.ckpt"
    sentence = "a diffusers folder cannot hold the model's guidance scale, 3.5: give it with every prompt."
    torch.save({"state_dict": {name: tiny_state[name] for name in WEIGHTS}, "guidance_scale": 3.5}, path)
    code, _, err = run("convert", path, "folder", "--to", "diffusers")
    assert (code, err.count(sentence)) == (0, 1)
    for others in (
        ("folder", "y.safetensors", "--to", "original"),
        (path, "unet", "--to", "diffusers", "--only", "unet"),
    ):
        code, _, err = run("convert", *others)
        assert (code, err.count(sentence)) == (0, 0)


def test_a_precision_is_that_of_every_file(tmp_path, ours):
    convert(ours, tmp_path / "half", layout="diffusers", precision="fp16")
    for name in (UNET, VAE, TEXT):
        tensors = safetensors.torch.load_file(tmp_path / "half" / name)
        before = safetensors.torch.load_file(ours / name)
        same_bits(tensors, {key: value.half() for key, value in before.items()})


def test_our_file_made_from_a_folder_says_where_its_parts_came_from(tmp_path, ours):
    convert(ours, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as file:
        assert set(json.loads(file.metadata["source_files"])) == {UNET, VAE, TEXT}
        assert file.metadata["source_file"] == "model"
        assert read_checkpoint(file).config == TINY


def test_what_the_original_layout_cannot_say_is_not_lost_silently(tmp_path, copy):
    edit(copy / "scheduler/scheduler_config.json", beta_end=0.02)
    with pytest.raises(TargetError, match=r"cannot store the noise schedule: .*0\.02"):
        convert(copy, tmp_path / "x.ckpt")
    convert(copy, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "again", layout="diffusers")
    assert look(tmp_path / "again").config.schedule.beta_end == 0.02


@pytest.mark.slow
def test_a_model_that_predicts_v_does_so_in_every_layout(tmp_path, copy):
    edit(copy / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    convert(copy, tmp_path / "a.ckpt", verify=True)
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", verify=True)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", layout="original", verify=True)
    convert(tmp_path / "c.safetensors", tmp_path / "again", layout="diffusers")
    for name in ("a.ckpt", "b.safetensors", "c.safetensors", "again"):
        assert look(tmp_path / name).config.prediction == "v"


def test_an_unfinished_folder_does_not_stay(tmp_path, tiny_state):
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    make_checkpoint.save_original(tmp_path / "x.ckpt", tiny_state | {name: torch.full((64,), 1e5)})
    with pytest.raises(WeightMismatchError, match="beyond fp16"):
        convert(tmp_path / "x.ckpt", tmp_path / "folder", layout="diffusers", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_folder_is_replaced_only_if_forced_and_only_if_it_holds_a_model(tmp_path, copy, tiny_ckpt):
    (copy / "extra.txt").write_text("of before")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(tiny_ckpt, copy, layout="diffusers")
    convert(tiny_ckpt, copy, layout="diffusers", force=True)
    assert not (copy / "extra.txt").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    for force in (False, True):
        with pytest.raises(TargetError, match="is not replaced"):
            convert(tiny_ckpt, precious, layout="diffusers", force=force)
    with pytest.raises(TargetError, match="is the source itself"):
        convert(copy, copy, layout="diffusers", force=True)
    with pytest.raises(TargetError, match="contains the source"):
        convert(copy / UNET, copy, layout="diffusers", force=True)
    with pytest.raises(TargetError, match="has the name of a file"):
        convert(copy, tmp_path / "x.ckpt", layout="diffusers")
    assert (precious / "thesis.txt").read_text() == "all of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


def test_the_command_converts_both_ways(tmp_path, tiny_ckpt, tiny_state, capsys):
    folder, back = tmp_path / "folder", tmp_path / "back.ckpt"
    assert main(["convert", str(tiny_ckpt), str(folder), "--to", "diffusers"]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert main(["convert", str(folder), str(back)]) == 0
    same_bits(torch.load(back)["state_dict"], {name: tiny_state[name] for name in WEIGHTS})
    assert main(["convert", str(tiny_ckpt), str(tmp_path / "other")]) == 2
    assert "for a folder, ask for --to diffusers" in capsys.readouterr().err


# The tables


@pytest.mark.parametrize("config", [SD_V1, TINY])
def test_the_tables_name_each_weight_of_the_library_s_networks_once(config):
    from sd.networks.build import build_networks

    networks = build_networks(config)
    with torch.device("meta"):
        theirs = {"unet": oracles.diffusers_unet(config, networks), "vae": oracles.diffusers_vae(config, networks)}
    wanted = {
        f"{part}.{name}": tuple(value.shape)
        for part, network in theirs.items()
        for name, value in network.state_dict().items()
    }
    mine = {
        theirs.name: tuple(networks[part].get_parameter(name).shape) + (1,) * theirs.unit_axes
        for ours, theirs in diffusers_names(config).items()
        for part, _, name in [ours.partition(".")]
        if part != "text_encoder"
    }
    assert mine == wanted
