"""Names of samplers and schedules: other programs' spellings, and where runs end."""

import re
from pathlib import Path

import pytest

from sd.pipeline.settings import Settings
from sd.sampling import names as sampler_names
from sd.sampling import samplers, spacing
from sd.sampling.names import (
    POINTLESS,
    SAMPLER_INFO,
    SCHEDULES,
    final_alpha,
    meaning,
    objection,
    plain,
    schedule_name,
)


def sampler_name(text):
    """The sampler and the schedule that a name means."""
    found = meaning(text)
    return found and (found.sampler, found.schedule)


def test_the_table_has_the_samplers_and_schedules_that_exist():
    assert list(SAMPLER_INFO) == list(samplers.SAMPLERS)
    assert sorted(SCHEDULES) == sorted([*spacing.TIMESTEPS, *spacing.SIGMAS])
    assert {row.schedule for row in SAMPLER_INFO.values()} <= set(SCHEDULES)


SPELLINGS = {
    ("euler_a", None): "Euler a, k_euler_a, k_euler_ancestral, euler-ancestral, EulerAncestralDiscreteScheduler, "
    "sample_euler_ancestral",
    ("euler", None): "Euler",
    ("euler", "karras"): "euler_k",
    ("lms", None): "k_lms",
    ("lms", "karras"): "LMS Karras, LMSD Karras",
    ("euler_a", "normal"): "euler_a discrete",
    ("dpmpp_2m", None): "DPM++ 2M, dpmsolver++, dpm_solver, DPMSolverMultistepScheduler",
    ("dpmpp_2m", "karras"): "DPM++ 2M Karras, dpmpp_2m_k",
    ("dpmpp_2m", "sgm_uniform"): "DPM++ 2M SGM Uniform",
    ("dpmpp_2m_sde", None): "DPM++ 2M SDE, dpmpp_2m_sde_gpu",
    ("dpmpp_2m_sde", "exponential"): "DPM++ 2M SDE Exponential",
    ("dpmpp_sde", "karras"): "DPM++ SDE Karras",
    ("dpmpp_2s_a", None): "dpmpp_2s_ancestral, dpm++2s_a",
    ("dpmpp_2s_a", "karras"): "DPM++ 2S a Karras",
    ("dpm2", None): "DPM2, k_dpm_2, KDPM2DiscreteScheduler, KDPM2",
    ("dpm2_a", None): "k_dpm_2_a, kdpm_2_a, KDPM2 a",
    ("dpm2_a", "karras"): "DPM2 a Karras",
    ("unipc", None): "unipc, UniPCMultistepScheduler",
    ("unipc_bh1", None): "uni_pc, UniPC",
    ("unipc_bh2", None): "uni_pc_bh2",
    ("plms", None): "PNDM",
    ("ddim", None): "k_ddim,  DDIM ",
    ("lcm", None): "LCM, LCMScheduler",
    ("lcm", "distilled"): "lcm distilled",
    ("tcd", None): "TCD, TCDScheduler, sample_tcd",
    ("heun", "beta"): "heun_beta",
    ("heun", "beta_sigmas"): "Heun Beta",
    ("heun", "normal"): "Heun Normal, heun_uniform",
    ("dpm2", "karras"): "DPM2 Karras, dpm2_karras, dpm_2_k",
    None: "ancestral, DPM++ 3M SDE, DPM++ 2M SDE Heun, Karras, ",
}


def test_other_programs_names_are_known():
    for expected, spellings in SPELLINGS.items():
        for text in spellings.split(", "):
            assert sampler_name(text) == expected, text
    for text, expected in {
        **{"SGM Uniform": "sgm_uniform", "sgm-uniform": "sgm_uniform", "KARRAS": "karras", "normal": "normal"},
        **{"Beta": "beta_sigmas", "beta": "beta"},
        **{"Uniform": "normal", "uniform": "normal", "ddim_uniform": "leading", "": None},
        **{"Polyexponential": "exponential", "KL Optimal": None, "Align Your Steps": None},
    }.items():
        assert schedule_name(text) == expected, text


def test_names_and_labels_of_every_sampler_are_known_alone_and_with_every_schedule():
    for name, row in SAMPLER_INFO.items():
        for text in (name, row.label.lower(), f"k_{name}"):
            assert sampler_name(text) == (name, None)
            for schedule, (label, _) in SCHEDULES.items():
                if schedule != "linspace":  # whose label means `normal` elsewhere
                    assert sampler_name(f"{text} {label.lower()}") == (name, schedule)


@pytest.mark.parametrize(
    ("texts", "sampler", "discards"),
    [
        ("DPM2, DPM2 Karras, k_dpm_2, dpm_2, K_DPM_2", "dpm2", True),
        ("DPM2 a, DPM2 a Karras, k_dpm_2_a, k_dpm_2_ancestral, dpm_2_ancestral, DPM2 a Uniform", "dpm2_a", True),
        ("uni_pc, uni_pc Karras", "unipc_bh1", True),
        ("uni_pc_bh2", "unipc_bh2", True),
        ("UniPC", "unipc_bh1", False),
        ("dpm2, dpm2_karras, KDPM2DiscreteScheduler", "dpm2", False),
        ("dpm2_a, dpm2 a karras, KDPM2AncestralDiscreteScheduler", "dpm2_a", False),
        ("unipc, unipc_karras, UniPCMultistepScheduler", "unipc", False),
        ("Euler a, k_euler, DPM++ 2M Karras", None, False),
    ],
)
def test_names_that_mean_something_else_elsewhere_mean_it_here_too(texts, sampler, discards):
    for text in texts.split(", "):
        found = meaning(text)
        assert (found.sampler, found.discards) == (sampler or found.sampler, discards), text
        assert Settings(prompt="", width=64, height=64, seed=1, sampler=text).discard_penultimate is discards


def test_no_spelling_means_two_samplers():
    rows = [{name, plain(row.label), *row.spellings.split()} for name, row in SAMPLER_INFO.items()]
    assert sum(map(len, rows)) == len(sampler_names.SAMPLER_SPELLINGS)
    assert all(spelling == plain(spelling) for spelling in sampler_names.SAMPLER_SPELLINGS)


def test_only_four_samplers_with_their_own_schedule_end_with_a_little_noise():
    ends = {(name, schedule): final_alpha(name, schedule) for name in SAMPLER_INFO for schedule in SCHEDULES}
    # as in the web UI: unipc_bh1; as its authors do: tcd
    first = [("ddim", "leading"), ("plms", "leading"), ("unipc_bh1", "sgm_uniform"), ("tcd", "distilled")]
    assert [pair for pair, end in ends.items() if end == "first"] == first
    assert final_alpha("unipc_bh1", "sgm_uniform", discards=True) == "one"


def test_the_documentation_names_every_sampler_schedule_and_pointless_pair():
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
