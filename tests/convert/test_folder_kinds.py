"""Folders that nearly are a diffusers model: what can be read is read, and the rest is named for what it is."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import TINY, refused
from hostile import look, refused_model
from safetensors.torch import load_file

from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.checkpoint import read_checkpoint
from convert.errors import UnsupportedFileError
from convert.files.reader import open_checkpoint
from convert.layouts.diffusers_names import COMPONENTS

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny_ckpt):
    folder = tmp_path_factory.mktemp("ours") / "model"
    convert(tiny_ckpt, folder, layout="diffusers")
    return folder


@pytest.fixture
def copy(tmp_path, ours):
    """A folder that a test may change; its weights are links."""
    folder = tmp_path / "model"
    shutil.copytree(ours, folder, copy_function=os.link)
    return folder


def edit(path, **changes):
    settings = json.loads(path.read_text()) | changes
    path.unlink()  # it is a link
    path.write_text(json.dumps(settings))


# Several weights of one component


def with_variants(folder, variants):
    """Give each component these variants of its weights: {"unet": ["", "fp16"], ...}; "" is the plain one."""
    for name in (UNET, VAE, TEXT):
        plain = folder / name
        for variant in variants[name.partition("/")[0]]:
            if variant:
                os.link(plain, plain.with_name(plain.name.replace(".safetensors", f".{variant}.safetensors")))
        if "" not in variants[name.partition("/")[0]]:
            plain.unlink()


def taken(folder, variant=None):
    with open_checkpoint(folder, variant=variant) as file:
        return [part.path.name for part in file.files], list(read_checkpoint(file).notes)


@pytest.mark.parametrize(
    ("there", "asked", "expected", "note"),
    [
        (["bf16"], None, "bf16", "using the bf16 weights of unet, vae and text_encoder, the only ones there"),
        (["fp32"], None, "fp32", "the only ones there"),
        (["non_ema"], None, "non_ema", "the only ones there"),
        (["", "fp16"], None, "", "using the plain weights of unet, vae and text_encoder, not the fp16 ones (--v"),
        (["bf16", "fp16"], None, "fp16", "not the bf16 ones"),
        (["", "fp16"], "fp16", "fp16", None),
        (["", "non_ema"], "non_ema", "non_ema", None),
    ],
)  # fmt: skip
def test_the_variant_that_is_there_or_asked_for_is_taken(copy, there, asked, expected, note):
    with_variants(copy, dict.fromkeys(COMPONENTS, there))
    files, notes = taken(copy, asked)
    assert [name.replace("diffusion_pytorch_", "") for name in files] == [
        f"model.{expected}.safetensors".replace("..", ".")
    ] * 3
    assert len(notes) == (note is not None)
    assert all(note in told for told in notes)


def test_a_variant_of_one_component_goes_with_the_plain_weights_of_the_others(copy):
    with_variants(copy, {"unet": ["", "non_ema"], "vae": [""], "text_encoder": [""]})
    files, notes = taken(copy, "non_ema")
    assert files == [
        UNET.replace(".safe", ".non_ema.safe").rpartition("/")[2],
        VAE.rpartition("/")[2],
        "model.safetensors",
    ]
    assert notes == ["using the plain weights of vae and text_encoder, the only ones there"]


def test_a_variant_that_is_nowhere_is_refused_with_those_that_are(copy, tiny_ckpt, run):
    with_variants(copy, {part: ["", "fp16"] for part in COMPONENTS})
    refused(run("inspect", copy, "--variant", "bf16"), "has no bf16 weights; there are fp16, plain ones")
    refused(run("convert", tiny_ckpt, "x.ckpt", "--variant", "fp16"), "is a single file, which has no variants")


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("diffusion_flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("openvino_model.bin", "OpenVINO"),
        ("Unet.mlmodelc", "Core ML"),
        ("unet-q4.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
    ],
)
def test_weights_of_other_programs_are_named(copy, tmp_path, name, program):
    (copy / UNET).rename(copy / "unet" / name)
    refused_model(copy, UnsupportedFileError, f"holds weights of {program}, which cannot be read: {name}")
    (tmp_path / "theirs/unet").mkdir(parents=True)
    (tmp_path / "theirs/unet" / name).write_bytes(b"x")
    refused_model(tmp_path / "theirs", UnsupportedFileError, f"weights of {program}", f"unet/{name}")


WRAPPED = {  # what a .bin holds, for its dictionary of tensors
    "another word": lambda tensors: {"module": tensors, "epoch": 3},
    "a list": lambda tensors: [tensors],
    "beside an optimiser": lambda tensors: {"w": tensors, "o": {"state": {0: torch.ones(2)}, "param_groups": []}},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_of_a_component_are_found_in_any_wrapper(copy, how):
    tensors = load_file(copy / UNET)
    (copy / UNET).unlink()
    torch.save(WRAPPED[how](tensors), copy / "unet/diffusion_pytorch_model.bin")
    assert look(copy).config == TINY
    torch.save({"epoch": 3}, copy / "unet/diffusion_pytorch_model.bin")
    refused_model(copy, UnsupportedFileError, "unet/diffusion_pytorch_model.bin holds no tensors")


def test_settings_that_say_nothing_do_not_stand_in_the_way(copy):
    edit(copy / "scheduler/scheduler_config.json", trained_betas=[], rescale_betas_zero_snr=True)
    assert look(copy).said.ends_in_noise
    edit(copy / "scheduler/scheduler_config.json", rescale_betas_zero_snr=False)
    assert look(copy).notes == ()


# Folders that nearly are one


def test_a_folder_without_an_index_is_read_by_its_components(copy):
    (copy / "model_index.json").unlink()
    assert look(copy).config == TINY
    shutil.rmtree(copy / "scheduler")
    assert look(copy).config == TINY


def test_of_a_training_checkpoint_the_unet_can_be_taken(copy, tmp_path, ours):
    (copy / "model_index.json").unlink()
    for part in ("vae", "text_encoder"):
        shutil.rmtree(copy / part)
    shutil.copytree(copy / "unet", copy / "unet_ema")
    (copy / "optimizer.bin").write_bytes(b"x")
    assert inspect(copy).notes == ("using unet, not the average over the training in unet_ema",)
    refused_model(
        copy, UnsupportedFileError, "has no vae", "It has no text_encoder either", "sd convert --only takes unet"
    )
    convert(copy, tmp_path / "unet.safetensors", part="unet")
    assert inspect(tmp_path / "unet.safetensors", tensors_hashed=True).tensors_sha256 == (
        inspect(ours / "unet", tensors_hashed=True).tensors_sha256
    )
    shutil.rmtree(copy / "unet")
    refused_model(copy, UnsupportedFileError, "has no folder unet, but unet_ema. Give that folder, with --only unet")
    convert(copy / "unet_ema", tmp_path / "ema.safetensors", part="unet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "has no vae: its folder vae is not there"),
        (lambda folder: (folder / VAE).unlink(), "has no weights of its vae"),
        (lambda folder: (folder / "vae/config.json").unlink(), "has no vae/config.json"),
        (lambda folder: edit(folder / "model_index.json", vae=["diffusers", "VQModel"]), "of the class VQModel"),
        (lambda folder: edit(folder / "model_index.json", vae=[None, None]), "has no vae in its model_index.json"),
    ],
)
def test_a_component_that_is_missing_spoils_no_other_one(copy, tmp_path, ours, change, words):
    change(copy)
    refused_model(copy, UnsupportedFileError, words)
    convert(copy, tmp_path / "x.safetensors", part="unet")
    with pytest.raises(UnsupportedFileError, match=re.escape(words)):
        convert(copy, tmp_path / "y.safetensors", part="vae")
    convert(copy, tmp_path / "whole.safetensors", vae=ours / "vae")
    assert look(tmp_path / "whole.safetensors").config == TINY


FOREIGN = {  # class of a component -> what is said of a folder that holds one
    "ControlNetModel": "is a ControlNet: its config.json names ControlNetModel. It steers a checkpoint",
    "MotionAdapter": "is a motion module: its",
    "T2IAdapter": "is a T2I-Adapter: its",
    "FluxTransformer2DModel": "is a FLUX checkpoint: its",
    "SD3Transformer2DModel": "is a Stable Diffusion 3 checkpoint: its",
    "AutoencoderKLTemporalDecoder": "is a VAE of a video model: its",
    "StableDiffusionSafetyChecker": "is a safety checker: its",
    "CLIPVisionModelWithProjection": "is an image encoder, such as CLIP's: its",
    "T5EncoderModel": "is a T5 text encoder: its",
    "LlamaForCausalLM": "is a language model: its",
    "VQModel": "is the folder of one component (VQModel), which is no part of Stable Diffusion 1, 2 or XL",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("key", ["_class_name", "architectures"])
def test_the_folder_of_a_foreign_component_is_called_what_it_is(tmp_path, name, key):
    (tmp_path / "config.json").write_text(json.dumps({key: name if key == "_class_name" else [name]}))
    refused_model(tmp_path, UnsupportedFileError, FOREIGN[name])


def in_a_cache(folder, commits, main=None):
    """A folder as huggingface_hub keeps one, with this model as each snapshot."""
    cache = folder.parent / "models--org--x"
    for commit in commits:
        shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir(parents=True)
    if main is not None:
        (cache / "refs/main").write_text(main)
    return cache


@pytest.mark.parametrize(
    ("commits", "main"), [(["abc"], None), (["abc"], "gone"), (["abc", "def"], "def\n"), (["abc"], "../../elsewhere")]
)
def test_the_folder_of_a_cache_means_its_snapshot(copy, commits, main):
    cache = in_a_cache(copy, commits, main)
    with open_checkpoint(cache) as file:
        assert file.path == cache / "snapshots" / commits[-1]
        assert file.called == "models--org--x"
        assert read_checkpoint(file).config == TINY


def test_a_cache_that_does_not_tell_is_refused_with_what_it_holds(copy, tmp_path):
    cache = in_a_cache(copy, ["abc", "def"], "gone")
    refused_model(cache, UnsupportedFileError, "2 snapshots", "abc, def")
    (tmp_path / "models--org--y/snapshots").mkdir(parents=True)
    refused_model(tmp_path / "models--org--y", UnsupportedFileError, "has not been downloaded")
    refused_model(tmp_path, UnsupportedFileError, "is a cache of models", "models--org--x, models--org--y")


@pytest.mark.parametrize("inner", ["", "archive"])
def test_an_unpacked_checkpoint_can_be_packed_again_as_told(tmp_path, inner):
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "x.ckpt")
    folder = tmp_path / "given" / inner
    with zipfile.ZipFile(tmp_path / "x.ckpt") as packed:
        packed.extractall(tmp_path / "out")
    folder.parent.mkdir(exist_ok=True)
    (tmp_path / "out" / "x").rename(folder)
    with pytest.raises(UnsupportedFileError, match="is an unpacked checkpoint") as caught:
        open_checkpoint(tmp_path / "given")
    words = str(caught.value).rpartition("python ")[2].rstrip(".").split()
    subprocess.run([sys.executable, *words], cwd=folder.parent, check=True)
    with open_checkpoint(folder.parent / words[3]) as file:
        assert file.root["state_dict"]["a"].shape == (3,)


def test_links_that_lead_nowhere_are_named(copy, tmp_path):
    (copy / UNET).unlink()
    (copy / UNET).symlink_to("../blobs/5e")
    refused_model(copy, UnsupportedFileError, "is a link to ../blobs/5e, which does not exist")
    (copy / "vae/config.json").unlink()
    (copy / "vae/config.json").symlink_to("gone.json")
    refused_model(copy, UnsupportedFileError, "has no vae/config.json: it is a link to gone.json, which does not exist")
    (tmp_path / "x.ckpt").symlink_to("nowhere.ckpt")
    refused_model(tmp_path / "x.ckpt", UnsupportedFileError, "x.ckpt is a link to nowhere.ckpt, which does not exist")


def test_a_folder_with_checkpoints_names_them(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/a.ckpt").write_bytes(b"x")
    refused_model(tmp_path / "models", UnsupportedFileError, "Give one of its files: a.ckpt")
