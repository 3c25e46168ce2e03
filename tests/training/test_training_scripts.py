"""The training scripts from end to end, for two steps: from nothing to a model file, and from there on."""

import csv
import json
import shutil
import sys
from functools import partial
from itertools import pairwise

import finetune
import numpy as np
import pytest
import score_depth
import score_editing
import score_inpainting
import score_samplers
import score_tiny
import torch
import train_depth
import train_editing
import train_inpainting
import train_tiny
from PIL import Image
from safetensors.torch import load_file
from training_command import run

import sd
from convert.actions.extract import extract
from sd.files import embedded_model
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.training.shapes.scoring import one_thing
from sd.training.shapes.stages import STAGES

pytestmark = pytest.mark.slow
SHORT = ["--size", "64", "--trial", "--sample-every", "2"]


@pytest.fixture(autouse=True, scope="module")
def _two_steps_a_sample():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "StableDiffusion", partial(StableDiffusion, usual={"steps": 2}))
        yield


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    with torch.enable_grad():
        train_tiny.main([str(folder), *SHORT])
    yield folder
    shutil.rmtree(folder)  # 600 MB


def test_a_model_is_trained_from_scratch_and_loads(trained):
    model = sd.load(trained / "model.ckpt")
    assert (model.config.family, model.config.native_size, model.config.unet.width) == ("sd-v1", 64, 64)
    assert model.config.prediction == "v"
    assert (trained / "model.ckpt").stat().st_size < 40e6
    for stage in STAGES:
        with open(trained / stage.name / "loss.csv", newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
        if stage.trains != "text encoder":
            assert Image.open(trained / stage.name / "samples-000002.png").width >= 256


def changed_by(folder, stage):
    """The parts of the networks that a stage changed, by comparison with what it began with."""
    names = [each.name for each in STAGES]
    before = {}
    for name in names[: names.index(stage)]:
        before |= load_file(folder / f"{name}.safetensors")
    after = load_file(folder / f"{stage}.safetensors")
    return {
        ".".join(name.split(".")[:2]) for name in after if name in before and not torch.equal(before[name], after[name])
    }


def test_the_decoder_is_trained_last_and_the_encoder_left_alone(trained):
    assert changed_by(trained, "decoder") == {"vae.post_quant_conv", "vae.decoder"}
    assert {"vae.encoder", "vae.quant_conv"} < changed_by(trained, "vae")
    after = load_file(trained / "decoder.safetensors")
    model = sd.load(trained / "model.ckpt", precision="fp32")
    assert torch.equal(model.vae.decoder.conv_in.weight, after["vae.decoder.conv_in.weight"].half().float())


def test_each_stage_of_the_unet_goes_on_where_the_last_ended(trained):
    """Two steps with a learning rate of 3e-3; the root mean square of Muon's updates is about 0.2 times that."""
    for before, after in pairwise(stage.name for stage in STAGES if stage.trains == "unet"):
        states = [load_file(trained / f"{name}.safetensors") for name in (before, after)]
        one, other = (state["unet.input_blocks.1.residual.conv1.weight"] for state in states)
        assert 0 < (other - one).square().mean().sqrt() < 2e-3
        assert not any(name.startswith("text_encoder.") for name in states[1])


def test_stages_one_by_one_are_the_whole(trained, tmp_path):
    """Stopped after any of them, or with some done by a second process."""
    for stages in (["reading"], ["vae-parts"], ["vae", "one-thing"], []):
        train_tiny.main([str(tmp_path), *SHORT, *(["--stages", *stages] if stages else [])])
    for stage in STAGES:
        ours, theirs = (load_file(folder / f"{stage.name}.safetensors") for folder in (tmp_path, trained))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), stage.name


def test_finished_parts_are_not_trained_again(trained):
    before = {
        path: path.stat().st_mtime_ns
        for path in trained.rglob("*")
        if path.parent != trained and path.name != "prompts.txt"
    }
    train_tiny.main([str(trained), *SHORT])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_training_refuses_to_continue_with_other_options(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", str(trained), *SHORT, "--seed", "1"])
    (trained / "reading.safetensors").rename(trained / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        run(train_tiny.main)
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train_tiny: ")
    assert "made with other options (seed was 0, is 1" in message
    (trained / "elsewhere").rename(trained / "reading.safetensors")


def test_training_can_start_from_a_model(trained, tmp_path):
    train_tiny.main([str(tmp_path), *SHORT, "--init", str(trained / "model.ckpt"), "--stages", "everything"])
    before, after = (sd.load(folder / "model.ckpt", precision="fp32") for folder in (trained, tmp_path))
    assert not (tmp_path / "vae").exists()
    assert torch.equal(before.vae.encoder.conv_in.weight, after.vae.encoder.conv_in.weight)
    change = after.unet.out.conv.weight - before.unet.out.conv.weight
    assert 0 < change.square().mean().sqrt() < 2e-3  # of two steps with a learning rate of 1e-3


def test_a_trained_model_is_finetuned_on_a_folder(trained, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"shade {number}")
    arguments = ["--steps", "2", "--batch-size", "2", "--learning-rate", "1e-3", "--ema-decay", "0.5", "--half"]
    finetune.main([str(trained / "model.ckpt"), str(photos), str(tmp_path / "run"), *arguments])
    assert {values.dtype for values in load_file(tmp_path / "run" / "state.safetensors").values()} == {torch.float32}
    start = sd.load(trained / "model.ckpt", precision="fp32")
    own, averaged = (
        sd.load(tmp_path / "run" / "model.ckpt", precision="fp32", weights=which) for which in ("model", "ema")
    )
    weights = [model.unet.out.conv.weight for model in (start, averaged, own)]
    distances = [(weight - weights[0]).norm().item() for weight in weights]
    assert 0 < distances[1] < distances[2]
    assert torch.equal(start.text_encoder.final_norm.weight, own.text_encoder.final_norm.weight)
    assert torch.equal(start.vae.decoder.conv_in.weight, own.vae.decoder.conv_in.weight)


def test_what_finetuning_taught_fits_into_a_lora(tmp_path):
    """At rank 16, the pictures are the fine-tuned model's to 40 dB; without the LoRA they are 12 dB further away."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (128, 128), colour).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"nothing but {colour}")
    finetune.main([str(embedded_model()), str(photos), str(tmp_path / "run"), "--steps", "60", "--batch-size", "2"])
    tuned, adapter = tmp_path / "run" / "model.ckpt", tmp_path / "x.safetensors"
    with torch.no_grad():
        extract(embedded_model(), tuned, adapter, rank=16)
        plain, target = (sd.load(path, precision="fp32") for path in (embedded_model(), tuned))

        def pictures(model):
            found = (model.txt2img(f"nothing but {colour}", steps=12, seed=3)[0] for colour in ("red", "blue"))
            return [np.asarray(picture).astype(float) for picture in found]

        wanted, before = pictures(target), pictures(plain)
        plain.apply([adapter])
        after = pictures(plain)

    def decibels(found):
        return [10 * np.log10(255**2 / ((a - b) ** 2).mean()) for a, b in zip(wanted, found, strict=True)]

    assert min(decibels(after)) >= 40
    assert all(b < a - 12 for a, b in zip(decibels(after), decibels(before), strict=True))


def test_the_score_counts_pictures_of_every_kind(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score_tiny, "one_thing", lambda repeats: one_thing(repeats)[:8])
    options = ["--repeats", "1", "--relations", "0", "--plain", "--steps", "3"]
    score_tiny.main([str(tmp_path / "scores"), "--model", str(trained / "model.ckpt"), *options])
    (row,) = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert (row["prompts"], row["pictures"]) == ("one thing", 8)
    assert row["right"]["all"] < 0.2
    assert "| one thing | default | 8 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "scores" / "one-thing.png").width >= 8 * 68


def test_samplers_are_scored_once_by_steps_and_by_schedule(trained, tmp_path, capsys):
    options = ["--prompts", "2", "--steps", "1,2", "--samplers", "ddim,dpmpp_2m", "--schedules", "leading"]
    arguments = [str(tmp_path), "--model", str(trained / "model.ckpt"), *options]
    score_samplers.main(arguments)
    found = json.loads((tmp_path / "samplers.json").read_text())
    by_steps = {f"{sampler} {steps}" for sampler in ("ddim leading", "dpmpp_2m karras") for steps in (1, 2)}
    assert set(found) == by_steps | {"ddim leading 20", "dpmpp_2m leading 20"}
    assert Image.open(tmp_path / "samplers.png").width > 500
    capsys.readouterr()
    (tmp_path / "samplers.json").write_text(json.dumps({**found, "ddim leading 2": 0.5}))
    score_samplers.main(arguments)
    assert "| ddim | leading | 0 % | 50 % |" in capsys.readouterr().out


def test_a_network_for_inpainting_is_made_from_the_small_model_trained_and_scored(trained, tmp_path, capsys):
    folder = tmp_path / "inpainting"
    short = ["--model", str(trained / "model.ckpt"), "--pictures", "4", "--batch-size", "2", "--steps", "2"]
    train_inpainting.main([str(folder), *short])
    model = sd.load(folder / "model.ckpt", precision="fp32")
    assert (model.config.family, model.config.unet.in_channels) == ("sd-v1-inpainting", 9)
    before = sd.load(trained / "model.ckpt", precision="fp32")
    assert torch.equal(model.text_encoder.token_embedding.weight, before.text_encoder.token_embedding.weight)
    assert not torch.equal(model.unet.out.conv.weight, before.unet.out.conv.weight)
    assert model.unet.input_blocks[0].conv.weight[:, 4:].any()
    capsys.readouterr()
    ordinary = ["--ordinary", str(trained / "model.ckpt"), "--count", "2", "--steps", "2"]
    score_inpainting.main([str(folder / "model.ckpt"), str(tmp_path / "scores"), *ordinary])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [
        ["ordinary network, blending", "2"],
        ["network for inpainting", "2"],
    ]
    assert Image.open(tmp_path / "scores" / "inpainting.png").height > 4 * 64


def test_a_network_for_depth_to_image_is_made_from_the_small_model_trained_and_scored(trained, tmp_path, capsys):
    folder = tmp_path / "depth"
    short = ["--model", str(trained / "model.ckpt"), "--pictures", "4", "--batch-size", "2", "--steps", "2"]
    train_depth.main([str(folder), *short])
    model = sd.load(folder / "model.ckpt", precision="fp32")
    assert (model.config.family, model.config.unet.in_channels) == ("sd-v1-depth", 5)
    assert model.unet.input_blocks[0].conv.weight[:, 4].any()
    capsys.readouterr()
    ordinary = ["--ordinary", str(trained / "model.ckpt"), "--count", "2", "--steps", "2", "--kinds", "single"]
    score_depth.main([str(folder / "model.ckpt"), str(tmp_path / "scores"), *ordinary])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| single", f"{task} to image", strength, "2"] for strength in ("0.8", "1") for task in ("image", "depth")
    ]
    assert Image.open(tmp_path / "scores" / "depth.png").height > 4 * 64
    train_depth.main([str(tmp_path / "more"), *short[2:], "--model", str(folder / "model.ckpt")])
    more = sd.load(tmp_path / "more" / "model.ckpt", precision="fp32")
    assert more.unet.input_blocks[0].conv.weight.shape[1] == 5
    assert not torch.equal(more.unet.out.conv.weight, model.unet.out.conv.weight)


def test_a_network_for_editing_is_made_from_the_small_model_trained_and_scored(trained, tmp_path, capsys):
    folder = tmp_path / "editing"
    short = ["--model", str(trained / "model.ckpt"), "--pictures", "4", "--batch-size", "2", "--steps", "2"]
    train_editing.main([str(folder), *short])
    model = sd.load(folder / "model.ckpt", precision="fp32")
    assert (model.config.family, model.config.unet.in_channels) == ("sd-v1-edit", 8)
    assert model.config.prediction == "v"
    before = sd.load(trained / "model.ckpt", precision="fp32")
    for part in ("unet", "text_encoder", "vae"):  # whether the file carries what was trained
        old, new = (getattr(each, part).state_dict() for each in (before, model))
        shared = [name for name in old if name != "input_blocks.0.conv.weight"]  # this one is wider
        assert all(torch.equal(old[name], new[name]) for name in shared) == (part == "vae")
    assert model.unet.input_blocks[0].conv.weight[:, 4:].any()
    capsys.readouterr()
    ordinary = ["--ordinary", str(trained / "model.ckpt"), "--count", "3", "--steps", "2"]
    score_editing.main([str(folder / "model.ckpt"), str(tmp_path / "scores"), *ordinary])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    counts = [*(["edit, by instruction", change, "1"] for change in ("colour", "shape", "background"))]
    counts += [["edit, by instruction", "any", "3"], ["img2img, by caption, strength 0.8", "any", "3"]]
    found = [(line[1], [line[0].removeprefix("| "), *line[2:4]]) for line in lines]
    assert found == [(scenes, row) for scenes in ("one thing", "one or two") for row in counts]
    assert Image.open(tmp_path / "scores" / "editing.png").height > 2 * 64
