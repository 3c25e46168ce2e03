"""Models for few steps: which names, metadata and hashes mean one, and what is said of it."""

import re
from dataclasses import replace
from pathlib import Path

import make_checkpoint
import pytest
import torch
from conftest import TINY
from hostile import look
from safetensors.torch import save_file
from test_few_steps import recommended, settings

import sd
from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.families.few_step_names import HASHES, MODEL_PATTERNS, NOT_TOLD, known_by_hash, model_advice
from convert.families.few_steps import LCM_MODEL, objection, usual_settings, with_usual
from convert.files.hashing import file_sha256
from sd.config import SD_V1, SD_V2, SDXL, SDXL_REFINER
from sd.sampling.schedule import alphas_cumprod, sigma_of

LCM = replace(SD_V1, unet=replace(SD_V1.unet, guidance_width=256))
KINDS = {kind.title: kind for kind in (LCM_MODEL, *(kind for _, _, kind in MODEL_PATTERNS))}
PUBLISHED = {  # as published, or as shared on from there
    ("SDXL Turbo", SDXL): "sd_xl_turbo_1.0_fp16.safetensors sd_xl_turbo_1.0.safetensors sdxl-turbo sdxl_turbo.ckpt "
    "models--stabilityai--sdxl-turbo",
    ("SD-Turbo", SD_V2): "sd_turbo.safetensors sd-turbo stabilityai/sd-turbo",
    ("one-step SDXL-Lightning", SDXL): "sdxl_lightning_1step_x0.safetensors sdxl_lightning_1step_unet_x0.safetensors",
    ("SDXL-Lightning (2 steps)", SDXL): "sdxl_lightning_2step.safetensors sdxl_lightning_2step_unet.safetensors",
    ("SDXL-Lightning (4 steps)", SDXL): "sdxl_lightning_4step.safetensors",
    ("SDXL-Lightning (8 steps)", SDXL): "sdxl_lightning_8step.safetensors SDXL-Lightning-8steps",
    ("the one-step UNet of Hyper-SD", SDXL): "Hyper-SDXL-1step-Unet.safetensors "
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors",
    ("DMD2", SDXL): "dmd2_sdxl_4step_unet_fp16.bin",
    ("one-step DMD2", SDXL): "dmd2_sdxl_1step_unet_fp16.bin",
    ("an SDXL Turbo fine-tune", SDXL): "dreamshaperXL_v21TurboDPMSDE.safetensors RealVisXL_V3.0_Turbo.safetensors "
    "turbovisionxlSuperFastXLBasedOnNew_tvxlV431Bakedvae.safetensors dreamshaper-xl-v2-turbo",
    ("an SDXL-Lightning fine-tune", SDXL): "dreamshaperXL_lightningDPMSDE.safetensors "
    "RealVisXL_V4.0_Lightning.safetensors juggernautXL_v9Rdphoto2Lightning.safetensors",
    ("a Hyper-SD fine-tune", SD_V1): "realisticVisionV60B1_v51HyperVAE.safetensors Realistic_Vision_V5.1_Hyper.ckpt",
    ("an LCM fine-tune", SD_V1): "dreamshaper_8LCM.safetensors AnyLoRA_lcm.ckpt",
}  # fmt: skip
OTHERS = (
    "sd_xl_base_1.0 v1-5-pruned-emaonly hyper_realism_v2 hyperdetailed welcmeXL lightningstrike filmcmd turbodiesel"
)


@pytest.mark.parametrize(("kind", "names"), PUBLISHED.items(), ids=[title for title, _ in PUBLISHED])
def test_published_models_are_recognised_by_name_and_by_metadata(kind, names):
    title, config = kind
    for name in names.split():
        assert model_advice(name, {}, config).kind.title == title, name
        for key in ("modelspec.title", "ss_output_name", "source_file"):
            told = model_advice("model.safetensors", {key: name.rpartition("--")[2].rpartition("/")[2]}, config)
            assert (told.kind.title, told.why) == (title, f"{key} in its metadata")


def test_ordinary_names_and_other_families_are_left_alone():
    for name in OTHERS.split():
        for config in (SD_V1, SDXL):
            assert model_advice(f"{name}.safetensors", {}, config) is None, name
    for name, config in (("sdxl-turbo", SD_V1), ("sd-turbo", SDXL), ("sdxl_lightning_4step", SD_V2)):
        assert model_advice(name, {}, config) is None
    assert model_advice("m", {"modelspec.description": "better than SDXL Lightning, says its author"}, SDXL) is None
    assert model_advice("sd_xl_refiner_1.0.safetensors", {}, SDXL_REFINER) is None
    assert model_advice("xl " * 100_000, {"modelspec.title": "turbo" * 100_000}, SDXL) is None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_advice_can_be_followed_and_the_usual_settings_are_far_from_it(kind):
    options = recommended(kind)
    sigmas = {"sigmas": (float(options.pop("sigmas")),)} if kind.sigma else {}
    whole = {name: int(options.pop(name)) for name in ("width", "height") if name in options}
    made = replace(settings(**options | sigmas | {"steps": int(options["steps"])}), **whole)
    assert {name: getattr(made, name) for name in options} == options
    assert objection(kind, made) is None
    assert objection(kind, settings(steps=30)) is not None
    assert kind.source.startswith("https://")
    assert kind.fewest <= kind.steps <= kind.most


def test_the_sigmas_of_one_step_are_those_of_their_timesteps():
    sigmas = sigma_of(alphas_cumprod(SDXL.schedule).double())
    for title, timestep in (("the one-step UNet of Hyper-SD", 800), ("one-step DMD2", 399)):
        assert KINDS[title].sigma == pytest.approx(sigmas[timestep].item(), rel=1e-5)


def test_sizes_far_from_the_training_are_named():
    text = objection(KINDS["SDXL Turbo"], replace(settings(), steps=1, guidance_scale=1.0, width=1024, height=1024))
    assert text.startswith("is SDXL Turbo, and the schedule karras and the size 1024x1024 are far from")
    assert text.endswith("--steps 1 --guidance-scale 1 --width 512 --height 512.")


def test_the_input_for_the_guidance_scale_tells_whatever_the_name_is():
    told = model_advice("sd_xl_base_1.0", {}, LCM)
    assert told.kind is LCM_MODEL
    assert told.note == (
        "is a latent consistency model, as the input of its UNet for the guidance scale says, for pictures in few "
        "steps. Recommended: --sampler lcm --schedule distilled --steps 4 --guidance-scale 8."
    )
    assert usual_settings(LCM) == {"sampler": "lcm", "steps": 4, "guidance_scale": 8.0}
    assert usual_settings(SD_V1) == {}
    assert with_usual(usual_settings(LCM), {"steps": 8}) == {"sampler": "lcm", "steps": 8, "guidance_scale": 8.0}
    assert "steps" not in with_usual(usual_settings(LCM), {"sigmas": (5.0, 1.0)})


def test_a_published_file_is_known_by_its_hash_under_any_name(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"whatever")
    assert known_by_hash(path, SDXL) is None
    monkeypatch.setitem(HASHES, file_sha256(path), "sd_xl_turbo_1.0_fp16")
    told = known_by_hash(path, SDXL)
    assert (told.kind.title, told.why) == ("SDXL Turbo", "its sha256")
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in HASHES)
    assert all(model_advice("", {}, SDXL, sha256) for sha256 in HASHES)


@pytest.fixture(scope="module")
def xl_state():
    made = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(SDXL), dtype=torch.float16)
    return {name: value.contiguous().clone() for name, value in made.items()}


def test_inspect_says_what_it_is_or_that_nothing_tells(tmp_path, xl_state):
    for name, note, predicts in (
        ("sdxl_lightning_1step_x0", "is one-step SDXL-Lightning, as its name says", ("x0", "its name")),
        ("m", NOT_TOLD, ("eps", "its family")),
    ):
        save_file(xl_state, tmp_path / f"{name}.safetensors")
        report = inspect(tmp_path / f"{name}.safetensors")
        assert report.notes[-1].startswith(note)
        assert (report.prediction, report.prediction_because) == predicts
    convert(tmp_path / "sdxl_lightning_1step_x0.safetensors", tmp_path / "short.safetensors")
    assert look(tmp_path / "short.safetensors").config.prediction == "x0"
    assert look(tmp_path / "short.safetensors").few_steps.why == "source_file in its metadata"
    assert look(tmp_path / "sdxl_lightning_1step_x0.safetensors").said.outside  # so pictures note it


@pytest.fixture(scope="module")
def lcm_file(tmp_path_factory):
    config = replace(TINY, unet=replace(TINY.unet, guidance_width=32))
    path = tmp_path_factory.mktemp("lcm") / "m.safetensors"
    save_file({name: value.clone() for name, value in make_checkpoint.made_up_state_dict(config).items()}, path)
    return path


@pytest.mark.slow
def test_pictures_of_a_latent_consistency_model_take_its_settings_unless_others_are_given(lcm_file, run):
    code, _, err = run("txt2img", "a cat", "-m", lcm_file, "-W", 64, "-H", 64, "-s", 1, "-o", "a.png")
    assert code == 0
    assert (
        "a latent consistency model, whose UNet takes the guidance scale as an input: by default, --sampler lcm" in err
    )
    assert "far from" not in err
    assert "is for networks distilled for it" not in err
    model = sd.load(lcm_file)
    options = {"width": 64, "height": 64, "seed": 1}
    (same,) = model.txt2img("a cat", **options)
    (other,) = model.txt2img("a cat", **options, steps=2, guidance_scale=3.0)
    (custom,) = model.txt2img("a cat", **options, sigmas=[5.0, 1.0])
    for picture, steps in ((same, 4), (other, 2), (custom, 2)):
        assert f"Steps: {steps}, Sampler: LCM" in picture.info["parameters"]
    assert "CFG scale: 8," in same.info["parameters"]


def test_settings_that_such_a_model_cannot_follow_are_said(lcm_file, run):
    code, _, err = run("txt2img", "x", "-m", lcm_file, "-W", 64, "-H", 64, "-n", "blurry", "-o", "b.png",
                       "--sampler", "dpmpp_2m", "--steps", 30)  # fmt: skip
    assert code == 0
    assert "the negative prompt is not used: this model takes the guidance scale as an input" in err
    assert "m.safetensors is a latent consistency model, and 30 steps and the sampler dpmpp_2m are far from" in err
    code, out, err = run("txt2img", "x", "-m", lcm_file, "--guidance-rescale", 0.5)
    assert (code, out) == (2, [])
    assert "takes the guidance scale as an input. Leave it out." in err


def test_the_documentation_recommends_the_same():
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    for kind in KINDS.values():
        title = re.escape(re.sub("^an? ", "", kind.title))
        (line,) = re.findall(rf"^\| {title} \|.*$", page, re.MULTILINE)
        assert f"`{kind.flags}`" in line
        assert f"({kind.source.partition('; ')[0]})" in line
