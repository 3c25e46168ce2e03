"""Adapters for few steps: which names mean one, and which settings are far from those that it is made for."""

import re
import shlex
from pathlib import Path

import pytest

from convert.families.few_step_names import PATTERNS, advice, words
from convert.families.few_steps import HYPER_1, LCM, objection
from sd.pipeline.settings import Settings

# As published, or as shared on from there: by title in the advice, and number of steps.
PUBLISHED = {
    (
        "LCM-LoRA",
        4,
    ): "lcm-lora-sdv1-5 lcm-lora-sdxl lcm-lora-ssd-1b LCM_LoRA_Weights_SD15 sd15_lcm_lora sdxl_lcm_lora lcm",
    ("SDXL-Lightning LoRA (2 steps)", 2): "sdxl_lightning_2step_lora",
    ("SDXL-Lightning LoRA (4 steps)", 4): "sdxl_lightning_4step_lora SDXL-Lightning-4steps",
    ("SDXL-Lightning LoRA (8 steps)", 8): "sdxl_lightning_8step_lora_rank1",
    ("one-step Hyper-SD LoRA", 1): "Hyper-SDXL-1step-lora Hyper-SD15-1step-lora hypersd-sd1-5-1-step-lora",
    ("Hyper-SD LoRA (2 steps)", 2): "Hyper-SD15-2steps-lora",
    ("Hyper-SD LoRA (4 steps)", 4): "Hyper-SDXL-4steps-lora",
    ("Hyper-SD LoRA (8 steps)", 8): "Hyper-SD15-8steps-lora",
    ("Hyper-SD CFG LoRA (8 steps)", 8): "Hyper-SDXL-8steps-CFG-lora",
    ("Hyper-SD CFG LoRA (12 steps)", 12): "Hyper-SD15-12steps-CFG-lora",
    ("Hyper-SD CFG LoRA (16 steps)", 16): "Hyper-SD3-16steps-CFG-lora",
    ("Turbo LoRA", 4): "sd_xl_turbo_lora_v1 sd_xl_turbo_lora_v1-64dim sd_turbo_lora",
    ("TCD-LoRA", 4): "TCD-SDXL-LoRA TCD-SD15-LoRA TCD-SD21-base-LoRA tcd_lora",
    ("DMD2 LoRA", 4): "dmd2_sdxl_4step_lora dmd2_sdxl_4step_lora_fp16",
    ("PCM LoRA (4 steps)", 4): "pcm_sd15_smallcfg_4step_converted",
    ("PCM LoRA for normal guidance (8 steps)", 8): "pcm_sdxl_normalcfg_8step_converted",
    ("PCM LoRA for normal guidance (16 steps)", 16): "pcm_sdxl_normalcfg_16step_converted",
    ("LCM-like PCM LoRA", 4): "pcm_sd15_lcmlike_lora_converted",
    ("Flash Diffusion LoRA", 4): "flash-sd flash-sdxl",
    ("AnimateLCM", 4): "AnimateLCM_sd15_t2v_lora",
}
OTHERS = (
    "helcmet welcme_sdxl lcm_portrait lightning_vfx sdxl_lightning_bolts lightning_2000steps hyper_sdxl_realism "
    "hyperdetailed_8steps porsche_911_turbo sdxl_turbo_diesel sdxl-turbo-DPO-LoRA camera_flash_sdxl dmd20_style "
    "tcdonald_sdxl pcmr_sdxl add_detail 4steps"
)
KINDS = {kind.title: kind for kind in (HYPER_1, *(kind for _, kind, _ in PATTERNS))}


def settings(**options):
    return Settings(prompt="", width=64, height=64, seed=0, **options)


def recommended(kind):
    """The settings that the advice writes as flags."""
    flags = iter(shlex.split(kind.flags))
    given = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags, flags, strict=True)}
    return {name: value if name in ("sampler", "schedule") else float(value) for name, value in given.items()}


@pytest.mark.parametrize(("kind", "names"), PUBLISHED.items(), ids=[title for title, _ in PUBLISHED])
def test_published_adapters_are_recognised_by_name_and_by_metadata(kind, names):
    for name in names.split():
        for metadata in ({}, {"ss_output_name": name}, {"modelspec.title": name}):
            found = advice("untitled" if metadata else name, metadata)
            assert (found.title.removeprefix("an ").removeprefix("a "), found.steps) == kind, name


def test_ordinary_names_are_left_alone():
    for name in OTHERS.split():
        assert advice(name, {}) is None, name
        assert advice("untitled", {"ss_output_name": name}) is None


def test_a_comment_counts_only_if_it_begins_with_the_name():
    assert advice("untitled", {"ss_training_comment": "goes well with LCM-LoRA and Hyper-SDXL-8steps-lora"}) is None
    assert advice("untitled", {"ss_training_comment": "LCM-LoRA, distilled from SD 1.5"}).sampler == "lcm"
    assert advice("untitled", {"ss_training_comment": "SDXL-Lightning, 4 steps"}).sampler == "euler"


def test_absurd_names_take_no_time():
    assert advice("pcm " * 100_000, {"ss_output_name": "animatediff " * 100_000, "modelspec.title": "\0\n"}) is None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_advice_can_be_followed_and_then_there_is_no_objection(kind):
    options = recommended(kind)
    made = settings(**options | {"steps": int(options["steps"])})
    assert {name: getattr(made, name) for name in options} == options
    assert (objection(kind, made) is None) is kind.for_pictures
    assert kind.fewest <= kind.steps <= kind.most
    assert kind.least_guidance <= kind.guidance <= kind.most_guidance
    assert kind.source.startswith("https://")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_usual_settings_are_far_from_all_of_them(kind):
    assert objection(kind, settings(steps=30)) is not None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lcm-lora-sdv1-5", {"sampler": "lcm", "steps": 30, "guidance_scale": 1.5}, "30 steps are far"),
        ("lcm-lora-sdv1-5", {"sampler": "lcm", "steps": 4}, "guidance scale 7.5 is far"),
        ("lcm-lora-sdv1-5", {"steps": 4, "guidance_scale": 1.0}, "the sampler dpmpp_2m is far"),
        ("lcm-lora-sdv1-5", {"sampler": "lcm", "steps": 1, "guidance_scale": 1.0}, "1 step is far"),
        ("lcm-lora-sdv1-5", {"sampler": "lcm", "schedule": "karras", "steps": 8, "guidance_scale": 2.5}, None),
        ("lcm-lora-sdv1-5", {"sampler": "euler_a", "steps": 12, "guidance_scale": 1.0}, None),
        ("sdxl_lightning_4step_lora", {"sampler": "euler", "schedule": "karras", "steps": 4, "guidance_scale": 1.0},
         "the schedule karras is far"),
        ("sdxl_lightning_4step_lora", {"sampler": "dpmpp_sde", "steps": 6, "guidance_scale": 2.0}, None),
        ("sdxl_lightning_8step_lora", {"sampler": "euler", "steps": 4, "guidance_scale": 1.0}, "4 steps are far"),
        ("Hyper-SD15-8steps-CFG-lora", {"sampler": "ddim", "schedule": "trailing", "steps": 8}, None),
        ("Hyper-SD15-8steps-CFG-lora", {"sampler": "euler", "steps": 8, "guidance_scale": 1.0}, "scale 1 is far"),
        ("Hyper-SDXL-1step-lora", {"sampler": "tcd", "steps": 6, "guidance_scale": 1.0}, None),
        ("TCD-SDXL-LoRA", {"sampler": "tcd", "steps": 50, "guidance_scale": 1.0}, None),
        ("AnimateLCM_sd15_t2v_lora", {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}, "for videos"),
    ],
)  # fmt: skip
def test_only_settings_that_are_far_off_are_objected_to(name, options, said):
    found = objection(advice(name, {}), settings(**options))
    assert found is None if said is None else said in found


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_without_choices_of_the_user_the_recommended_settings_are_used(kind):
    usual = settings(**kind.completing({"sigmas": (), "guidance_rescale": 0.0, "negative_prompt": "", "seed": 1}))
    expected = recommended(kind)
    assert usual == settings(**expected | {"steps": int(expected["steps"])})


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"steps": 3}, {"sampler", "guidance_scale"}),
        ({"sampler": "euler"}, {"steps", "guidance_scale"}),
        ({"schedule": "karras"}, {"steps", "guidance_scale"}),
        ({"eta": 0.0}, {"steps", "guidance_scale"}),
        ({"sigmas": (5.0, 1.0)}, {"guidance_scale"}),
        ({"guidance_scale": 0.0}, {"sampler", "steps"}),
        ({"guidance_rescale": 0.5}, {"sampler", "steps"}),
        ({"guidance_interval": (1.0, 5.0)}, {"sampler", "steps"}),
        ({"sampler": "lcm", "steps": 8, "guidance_scale": 1.5}, set()),
    ],
)
def test_what_the_user_chose_stays(given, left):
    found = LCM.completing(given)
    assert found.keys() & {"sampler", "steps", "guidance_scale"} == left
    assert ("schedule" in found) is ("sampler" in found)


def test_the_objection_names_all_that_is_far_and_what_to_use():
    text = objection(advice("lcm-lora-sdxl", {}), settings(steps=30))
    assert text == (
        "is an LCM-LoRA, and 30 steps, guidance scale 7.5 and the sampler dpmpp_2m are far from what it is made for. "
        "Recommended: --sampler lcm --schedule distilled --steps 4 --guidance-scale 1."
    )


def test_the_documentation_recommends_the_same():
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    for kind in KINDS.values():
        if kind.for_pictures:
            (line,) = re.findall(rf"^\| {kind.title.partition(' ')[2]} \|.*$", page, re.MULTILINE)
            assert f"`{kind.flags}`" in line
            assert any(f"({address})" in line for address in kind.source.split("; "))


def test_names_are_compared_as_words():
    assert words("Hyper-SD15-8steps-CFG_lora") == "hyper sd 15 8 steps cfg lora"
