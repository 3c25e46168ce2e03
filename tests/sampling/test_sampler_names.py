"""Names of samplers and schedules: everybody's spellings, and where runs end."""

import re
from pathlib import Path

import pytest

from sd.sampling import names as sampler_names
from sd.sampling import samplers, spacing
from sd.sampling.names import (
    POINTLESS,
    SAMPLER_INFO,
    SCHEDULES,
    final_alpha,
    objection,
    plain,
    sampler_name,
    schedule_name,
)


def test_the_table_has_the_samplers_and_schedules_that_exist():
    assert list(SAMPLER_INFO) == list(samplers.SAMPLERS)
    assert sorted(SCHEDULES) == sorted([*spacing.TIMESTEPS, *spacing.SIGMAS])
    assert {row.schedule for row in SAMPLER_INFO.values()} <= set(SCHEDULES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Euler a", ("euler_a", None)),
        ("k_euler_a", ("euler_a", None)),
        ("k_euler_ancestral", ("euler_a", None)),
        ("euler-ancestral", ("euler_a", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_a", None)),
        ("sample_euler_ancestral", ("euler_a", None)),
        ("Euler", ("euler", None)),
        ("euler_k", ("euler", "karras")),
        ("k_lms", ("lms", None)),
        ("LMS Karras", ("lms", "karras")),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_k", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("DPM++ 2M SDE", ("dpmpp_2m_sde", None)),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("dpmpp_2m_sde_gpu", ("dpmpp_2m_sde", None)),
        ("DPM++ SDE Karras", ("dpmpp_sde", "karras")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_a", "karras")),
        ("dpmpp_2s_ancestral", ("dpmpp_2s_a", None)),
        ("dpmsolver++", ("dpmpp_2m", None)),
        ("dpm_solver", ("dpmpp_2m", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("DPM2", ("dpm2", None)),
        ("k_dpm_2", ("dpm2", None)),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("k_dpm_2_a", ("dpm2_a", None)),
        ("uni_pc", ("unipc", None)),
        ("UniPC", ("unipc", None)),
        ("PNDM", ("plms", None)),
        ("k_ddim", ("ddim", None)),
        (" DDIM ", ("ddim", None)),
        ("LCM", ("lcm", None)),
        ("Heun Beta", ("heun", "beta")),
        ("ancestral", None),
        ("DPM++ 3M SDE", None),
        ("DPM++ 2M SDE Heun", None),
        ("Karras", None),
        ("", None),
    ],
)
def test_other_hands_names_are_known(text, expected):
    assert sampler_name(text) == expected


@pytest.mark.parametrize("name", SAMPLER_INFO)
def test_names_and_labels_of_every_sampler_are_known_alone_and_with_every_schedule(name):
    for text in (name, SAMPLER_INFO[name].label, f"k_{name}"):
        assert sampler_name(text) == (name, None)
        for schedule, (label, _) in SCHEDULES.items():
            assert sampler_name(f"{text} {label}") == (name, schedule)


def test_no_spelling_means_two_samplers():
    rows = [{name, plain(row.label), *row.spellings.split()} for name, row in SAMPLER_INFO.items()]
    assert sum(map(len, rows)) == len(sampler_names.SAMPLER_SPELLINGS)
    assert all(spelling == plain(spelling) for spelling in sampler_names.SAMPLER_SPELLINGS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("SGM Uniform", "sgm_uniform"), ("normal", "linspace"), ("Uniform", "linspace"), ("ddim_uniform", "leading"),
     ("KARRAS", "karras"), ("sgm-uniform", "sgm_uniform"), ("polyexponential", None), ("", None)],
)  # fmt: skip
def test_other_hands_schedules_are_known(text, expected):
    assert schedule_name(text) == expected


def test_only_the_originals_samplers_with_its_schedule_end_with_a_little_noise():
    ends = {(name, schedule): final_alpha(name, schedule) for name in SAMPLER_INFO for schedule in SCHEDULES}
    assert [pair for pair, end in ends.items() if end == "first"] == [("ddim", "leading"), ("plms", "leading")]


def test_the_documentation_names_every_sampler_and_schedule_and_what_makes_no_sense():
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    for name, row in SAMPLER_INFO.items():
        (line,) = re.findall(rf"^\| \[`{name}`\].*$", page, re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")]
        assert (cells[3], cells[4]) == (row.schedule, str(row.predictions))
        noise = "always" if name in ("ddpm", "lcm") else "" if row.eta is None else f"`--eta`, {row.eta:g}"
        assert cells[6] == noise
    assert all(re.search(rf"^\| `{name}` \|", page, re.MULTILINE) for name in SCHEDULES)
    for sampler, schedule in POINTLESS:
        assert re.search(rf"^\| `{sampler}` \| [a-z, ]*\b{schedule or 'all'}\b", page, re.MULTILINE)


def test_an_objection_is_to_a_sampler_or_to_a_pair():
    assert "distilled" in objection("lcm", "trailing")
    assert "evenly spaced" in objection("plms", "beta")
    assert objection("plms", "leading") is None
    assert all(sampler in SAMPLER_INFO and schedule in (None, *SCHEDULES) for sampler, schedule in POINTLESS)
