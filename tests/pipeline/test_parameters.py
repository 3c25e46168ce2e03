"""The texts that other tools write into pictures, read as settings of ours; and ours, read by others."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import refused, settings_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

from sd.pipeline.image.parameters import parameters_of
from sd.pipeline.image.stored_settings.texts import read_foreign_texts
from sd.pipeline.image.stored_settings.web_ui import settings_in
from sd.pipeline.settings import Settings
from sd.sampling.names import SCHEDULES

OLD = """a photograph of a (red:1.2) horse, 35mm: sharp
at dusk
Negative prompt: blurry, people
text
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, Model: v1-5"""
NEW = """a horse <lora:oil:0.8>
Steps: 12, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 4294967295, Size: 512x512, \
Variation seed: 7, Variation seed strength: 0.25, Denoising strength: 0.4, Clip skip: 2, Tiling: True, \
Hires upscale: 1.5, Hires steps: 9, Hires upscaler: R-ESRGAN 4x+, Lora hashes: "oil: 0123, b: 45", \
Hashes: {"model": "6ce0161689", "vae": "1"}, RNG: CPU, Version: v1.10.1"""


def test_a_text_of_old_with_the_schedule_in_the_samplers_name():
    found = settings_in(OLD)
    assert found.unused == []
    job = Settings(**found.settings)
    assert (job.sampler, job.schedule, job.steps, job.guidance_scale, job.seed) == ("dpmpp_2m", "karras", 20, 7, 1)
    assert (job.width, job.height, job.negative_prompt) == (512, 768, "blurry, people\ntext")
    plain = settings_in(OLD.replace(" Karras", "")).settings
    assert (plain["sampler"], plain["schedule"]) == ("dpmpp_2m", "normal")  # it had even steps then


def test_a_text_of_today_and_what_cannot_be_used_of_it():
    found = settings_in(NEW)
    job = Settings(**found.settings)
    assert (job.sampler, job.schedule, job.seed, job.clip_skip) == ("euler_a", "karras", 2**32 - 1, 2)
    assert (job.vary, job.vary_seed, job.tile) == (0.25, 7, "xy")
    assert (job.hires, job.hires_steps, job.hires_strength, job.hires_upscale) == ((768, 768), 9, 0.4, "image")
    assert job.adapters == (("oil", 0.8, 0.8),)
    assert found.unused == [
        "Hires upscaler: R-ESRGAN 4x+",
        'Hashes: {"model": "6ce0161689", "vae": "1"}',
        "LoRA b (45), whose strength is not noted",
    ]
    assert found.settings["rng"] == "cpu"


@pytest.mark.parametrize(
    ("ending", "rng", "noted"),
    [
        ("RNG: NV, Version: v1.6.0", "philox", False),
        ("RNG: CPU, Version: v1.6.0", "cpu", False),
        ("RNG: cuda, Version: stable-diffusion.cpp", "philox", False),
        ("Version: v1.6.0-2-g4afaaf8a", "philox", True),
        ("Version: 1.5.1", "philox", True),
        ("Version: f2.0.1v1.10.1-previous-635-gf5330788", "philox", True),
        ("Version: ComfyUI", None, False),
        ("Version: sd-zoo 0.1", None, False),
        ("Model: v1-5", None, False),
    ],
)
def test_noise_is_drawn_as_the_text_says_or_as_the_web_ui_does_by_default(ending, rng, noted):
    found = settings_in(f"a\nSteps: 5, Sampler: Euler a, Seed: 1, ENSD: 31337, {ending}")
    assert (found.settings.get("rng"), found.settings["seed_delta"], found.unused) == (rng, 31337, [])
    assert [note.split(",")[0] for note in found.notes] == ["noise drawn as on a GPU (--rng philox)"] * noted


@pytest.mark.parametrize("line", ["Sampler: DDIM, Eta DDIM: 0.5", "Sampler: Euler a, Eta: 0.5"])
def test_the_web_ui_has_two_names_for_eta(line):
    found = settings_in(f"a\nSteps: 5, {line}, Seed: 1")
    assert (found.settings["eta"], found.unused) == (0.5, [])


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("Steps: 5, Sampler: Restart, Seed: 1", "Sampler: Restart"),
        ("Steps: many, Sampler: Euler, Seed: 1", "Steps: many"),
        ("Steps: 5, Sampler: Euler, Seed: -1", "seed -1"),
        ("Steps: 5, Sampler: Euler, Seed: 1, Size: 500x512", "size 500x512"),
        ("Steps: 5, Sampler: Euler, Seed: 1, Schedule type: Turbo", "Schedule type: Turbo"),
        ("Steps: 5, Sampler: Euler, Seed: 1, CFG scale: nan", "guidance scale nan"),
    ],
)
def test_what_cannot_be_is_named_and_left_out(line, unused):
    found = settings_in("a\n" + line)
    assert found.unused == [unused]
    Settings(**{"width": 64, "height": 64, "seed": 0, **found.settings})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "ddim", "schedule": "trailing", "eta": 0.5, "negative_prompt": "b, c: d"},
        {"sigmas": [14.6, 3], "sampler": "lms"},
        {"hires": 2, "hires_steps": 7, "hires_strength": 0.5, "hires_upscale": "image"},
        {"hires": "1024x1032", "tile": "x", "vary": 0.5, "vary_seed": 3},
        {"plain_prompts": True, "clip_skip": 2, "guidance_rescale": 0.5, "zero_terminal_snr": True},
        {"strength": 0.5, "sampler": "dpmpp_2m_sde", "schedule": "exponential"},
        {"guidance_interval": (0.3, 5)},
        {"guidance_scale": 7.123456789, "strength": 1 / 3, "sigmas": (14.123456789, 1e-3)},
        {"reuse_features": 3, "hires": 2},
        {"merge_tokens": 0.5},
        {"rng": "philox", "seed_delta": -5},
        *({"sampler": name} for name in ("dpm2", "DPM2", "dpm2_a", "DPM2 a Karras", "unipc", "UniPC", "uni_pc_bh2")),
        *({"schedule": name} for name in SCHEDULES),
        {"schedule": "Beta", "discard_penultimate": True},
    ],
)
def test_our_own_text_is_read_back(options):
    job = Settings(prompt="a horse", width=512, height=512, seed=42, **options)
    found = settings_in(parameters_of(job, 'my, "best": model', "6ce0161689"))
    assert found.unused == []
    assert Settings(**found.settings) == job


@pytest.mark.parametrize(
    ("line", "expected"),  # sampler, schedule, whether the last noise level but one is left out
    [
        ("Sampler: DPM2 Karras", ("dpm2", "karras", True)),
        ("Sampler: DPM2 a, Schedule type: Automatic", ("dpm2_a", "karras", True)),
        ("Sampler: DPM2", ("dpm2", "normal", True)),
        ("Sampler: Euler", ("euler", "normal", False)),
        ("Sampler: Euler a, Schedule type: Automatic", ("euler_a", "normal", False)),
        ("Sampler: Euler, Schedule type: Uniform", ("euler", "normal", False)),
        ("Sampler: Heun, Schedule type: Beta", ("heun", "beta_sigmas", False)),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", ("dpmpp_2m", "karras", False)),
        ("Sampler: DPM++ 2M Karras, Discard penultimate sigma: True", ("dpmpp_2m", "karras", True)),
        ("Sampler: UniPC, Schedule type: Karras, Version: v1.9.4", ("unipc_bh1", "sgm_uniform", False)),
        ("Sampler: DDIM, Schedule type: Automatic, Version: v1.9.4", ("ddim", "leading", False)),
        ("Sampler: euler_a discrete, Eta: 0.000000, Version: stable-diffusion.cpp", ("euler_a", "normal", False)),
        ("Sampler: dpm++2s_a karras, Eta: inf, Version: stable-diffusion.cpp", ("dpmpp_2s_a", "karras", False)),
        ("Sampler: dpm2, Version: stable-diffusion.cpp", ("dpm2", "normal", False)),
        ("Sampler: DPM2, Schedule type: Uniform, Version: sd-zoo 0.1", ("dpm2", "linspace", False)),
        ("Sampler: UniPC, Schedule type: Beta, Version: sd-zoo 0.1", ("unipc", "beta", False)),
    ],
)
def test_samplers_and_schedules_mean_what_the_program_means_that_wrote_them(line, expected):
    found = settings_in(f"a\nSteps: 10, {line}, Seed: 1, Size: 64x64")
    assert found.unused == []
    job = Settings(**found.settings)
    assert (job.sampler, job.schedule, job.discard_penultimate) == expected
    assert job.eta in (None, 0 if job.sampler == "ddim" else 1)


def test_an_independent_reader_understands_ours(model, tmp_path):
    (picture,) = model.txt2img(
        "a horse, red: dusk", negative_prompt="blurry", seed=7, width=64, height=64, steps=2, vary=0.5, vary_seed=9
    )
    info = PngInfo()
    for name, text in picture.info.items():
        info.add_text(name, text)
    picture.save(tmp_path / "picture.png", pnginfo=info)
    read = ParserManager().parse(tmp_path / "picture.png")
    (sampler,) = read.samplers
    assert sampler.name == "DPM++ 2M"
    assert {name: sampler.parameters[name] for name in ("seed", "steps", "cfg_scale", "scheduler")} == {
        "seed": "7", "steps": "2", "cfg_scale": "7.5", "scheduler": "Karras",
    }  # fmt: skip
    assert [prompt.value for prompt in sampler.prompts] == ["a horse, red: dusk"]
    assert [prompt.value for prompt in sampler.negative_prompts] == ["blurry"]
    assert (sampler.model.name, sampler.model.hash) == ("tiny", "0123456789")
    assert {name: read.metadata[name] for name in ("Size", "Variation seed", "Variation seed strength")} == {
        "Size": "64x64", "Variation seed": "9", "Variation seed strength": "0.5",
    }  # fmt: skip


def save(path, **texts):
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.mark.slow
def test_like_makes_the_same_file_and_flags_beside_it_win(run, tiny_ckpt):
    common = ["-m", tiny_ckpt, "-W", 64, "-H", 72, "--steps", 2, "--sampler", "Euler a", "--eta", 0.5, "-g", 3]
    _, (first,), _ = run("txt2img", "a (red:1.2) horse", "-n", "b", "--seed", 5, *common)
    code, (again,), err = run("txt2img", "--like", first, "-m", tiny_ckpt)
    assert code == 0
    assert "could not use" not in err
    with open(first, "rb") as one, open(again, "rb") as other:
        assert one.read() == other.read()
    _, (changed,), _ = run("txt2img", "a cat", "--like", first, "-m", tiny_ckpt, "--plms", "--seed", 6)
    stored = settings_of(changed)
    assert [stored[name] for name in ("prompt", "sampler", "seed", "height")] == ["a cat", "plms", 6, 72]


def test_like_needs_nothing_that_another_command_did_before(tmp_path):
    """In a process of its own: Pillow knows its formats only after it was asked for them."""
    save(tmp_path / "theirs.png", parameters="a cat\nSteps: 2, Sampler: Euler, Seed: 9, Size: 64x64")
    code = "from pathlib import Path; from sd.pipeline.image.stored_settings.texts import read_foreign_texts; "
    code += "print(read_foreign_texts(Path('theirs.png'))['parameters'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("a cat\nSteps: 2"), result.stderr


def test_like_takes_the_text_of_another_tool_and_says_what_it_could_not_use(run, tiny_ckpt, tmp_path):
    text = "a cat\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 9, Size: 64x64, VAE: x.pt, Version: v1.6.0"
    save(tmp_path / "theirs.png", parameters=text)
    code, (path,), err = run("txt2img", "--like", "theirs.png", "-m", tiny_ckpt)
    assert code == 0
    assert "sd: theirs.png: could not use VAE: x.pt\n" in err
    stored = settings_of(path)
    expected = {"prompt": "a cat", "steps": 2, "sampler": "euler", "guidance_scale": 4, "seed": 9, "width": 64}
    assert {name: stored[name] for name in expected} == expected


@pytest.mark.slow
def test_like_says_what_it_uses_in_place_of_an_unknown_sampler(run, tiny_ckpt, tmp_path):
    text = "a cat\nSteps: 1, Sampler: DPM++ 3M SDE, Schedule type: Turbo, Seed: 9, Size: 64x64"
    save(tmp_path / "theirs.png", parameters=text)
    _, _, err = run("txt2img", "--like", "theirs.png", "-m", tiny_ckpt)
    assert "could not use Sampler: DPM++ 3M SDE; Schedule type: Turbo\n" in err
    assert "sd: theirs.png: the default sampler is used instead; expect another picture\n" in err
    _, _, err = run("txt2img", "--like", "theirs.png", "-m", tiny_ckpt, "--sampler", "euler", "--schedule", "karras")
    assert "is used instead" not in err


@pytest.mark.slow
def test_like_makes_a_picture_from_a_picture_again_whose_size_followed_from_it(run, tiny_ckpt, tiny_state, tmp_path):
    Image.effect_noise((124, 92), 60).convert("RGB").save(tmp_path / "in.png")
    torch.save({"state_dict": tiny_state, "native_size": 128}, tmp_path / "small.ckpt")
    common = ["img2img", "--init", "in.png", "-m", "small.ckpt"]
    _, (first,), _ = run(*common, "a cat", "--seed", 5, "--strength", 0.5, "--steps", 2, "-g", 1)
    code, (again,), err = run(*common, "--like", first)
    assert (code, Image.open(again).size) == (0, (124, 92))
    with open(first, "rb") as one, open(again, "rb") as other:
        assert one.read() == other.read()
    code, _, err = run("txt2img", "--like", first, "-m", tiny_ckpt, "-W", 64, "-H", 64)
    assert "could not use strength 0.5; resize mode crop; init in.png\n" in err


def test_a_text_that_is_too_long_is_named(run, tiny_ckpt, tmp_path):
    info = PngInfo()
    info.add_text("parameters", "A" * 2_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "long.png", pnginfo=info)
    refused(run("txt2img", "--like", "long.png", "-m", tiny_ckpt), "its text 'parameters' is longer than a megabyte")
    info.add_text("parameters", "a cat\nSteps: 2, Sampler: Euler, Seed: 9, Size: 64x64")
    Image.new("RGB", (8, 8)).save(tmp_path / "both.png", pnginfo=info)
    assert read_foreign_texts(tmp_path / "both.png")["parameters"].startswith("a cat")


def test_pictures_without_settings_are_refused(run, tiny_ckpt, tmp_path):
    save(tmp_path / "empty.png")
    save(tmp_path / "graph.png", parameters=json.dumps({"nodes": []}))
    for name in ("empty.png", "graph.png"):
        refused(run("txt2img", "--like", name, "-m", tiny_ckpt), f"--like {name} has no settings that can be read")
    refused(run("txt2img", "--like", "absent.png", "-m", tiny_ckpt), "absent.png does not exist. Give a picture file.")
