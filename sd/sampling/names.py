"""Samplers and schedules by name: ours, other programs', and those in the settings that a picture carries."""

import re
from typing import NamedTuple


class SamplerInfo(NamedTuple):
    """What settings need to know about a sampler."""

    label: str  # as other programs write it into their pictures
    schedule: str  # the default
    eta: float | None  # the default share of fresh noise; None for samplers without eta
    predictions: int  # by the network in one step
    spellings: str = ""  # other programs' names for the same, in the form that `plain` returns


# Default schedules: the original scripts' for the samplers in them; for the others the usual one, which is Karras's or
# an exponential one for solvers of order 2 and even timesteps otherwise.
SAMPLER_INFO = {
    "ddim": SamplerInfo("DDIM", "leading", 0.0, 1),
    "ddpm": SamplerInfo("DDPM", "leading", None, 1),
    "plms": SamplerInfo("PLMS", "leading", None, 1, "pndm"),
    "euler": SamplerInfo("Euler", "linspace", None, 1, "eulerdiscrete"),
    "euler_a": SamplerInfo("Euler a", "linspace", 1.0, 1, "euler_ancestral eulera eulerancestraldiscrete"),
    "heun": SamplerInfo("Heun", "linspace", None, 2, "heundiscrete"),
    "lms": SamplerInfo("LMS", "linspace", None, 1, "lmsdiscrete lmsd"),
    "dpm2": SamplerInfo("DPM2", "karras", None, 2, "kdpm2discrete kdpm2 kdpm_2"),
    "dpm2_a": SamplerInfo("DPM2 a", "karras", 1.0, 2, "dpm2_ancestral kdpm2ancestraldiscrete kdpm2_a kdpm_2_a"),
    "dpmpp_2s_a": SamplerInfo("DPM++ 2S a", "karras", 1.0, 2, "dpmpp_2s_ancestral dpmpp2sa dpmpp2s_a"),
    "dpmpp_2m": SamplerInfo(
        "DPM++ 2M", "karras", None, 1, "dpm_solver dpmsolver dpmsolverpp dpm_solverpp dpmpp dpmpp2m dpmsolvermultistep"
    ),
    "dpmpp_sde": SamplerInfo("DPM++ SDE", "karras", 1.0, 2, "dpmpp_sde_gpu dpmppsde dpmsolversde"),
    "dpmpp_2m_sde": SamplerInfo("DPM++ 2M SDE", "exponential", 1.0, 1, "dpmpp_2m_sde_gpu dpmpp2msde sde_dpmsolverpp"),
    "unipc": SamplerInfo("UniPC", "sgm_uniform", None, 1, "unipcmultistep"),
    "unipc_bh1": SamplerInfo("UniPC bh1", "sgm_uniform", None, 1),
    "unipc_bh2": SamplerInfo("UniPC bh2", "sgm_uniform", None, 1),
    "lcm": SamplerInfo("LCM", "distilled", None, 1),
    "tcd": SamplerInfo("TCD", "distilled", 0.3, 1),
}
SCHEDULES = {  # our name -> the label that other programs write, and other names
    "leading": ("DDIM", "ddim_uniform"),
    "trailing": ("Trailing", ""),
    "linspace": ("Uniform", ""),
    "normal": ("Normal", "uniform discrete"),
    "karras": ("Karras", ""),
    "exponential": ("Exponential", "polyexponential"),
    "sgm_uniform": ("SGM Uniform", "sgm"),
    "simple": ("Simple", ""),
    "beta": ("Beta", ""),
    "beta_sigmas": ("Beta sigmas", ""),
    "distilled": ("Distilled", ""),
}
# Names by which other programs mean something else than we do by the nearest of ours: the sampler, and whether they
# leave out the last noise level but one. Where the name itself is ours, it is theirs if written with a capital.
THEIRS = {
    "dpm2": ("dpm2", True),  # DPM2 in the web UI
    "dpm_2": ("dpm2", True),  # ComfyUI; k_dpm_2 in the web UI
    "dpm2_a": ("dpm2_a", True),
    "dpm_2_a": ("dpm2_a", True),
    "dpm_2_ancestral": ("dpm2_a", True),
    "unipc": ("unipc_bh1", False),  # UniPC in the web UI
    "uni_pc": ("unipc_bh1", True),  # ComfyUI
    "uni_pc_bh2": ("unipc_bh2", True),
}
THEIR_SCHEDULES = {"beta": "beta_sigmas"}  # the same for schedules: Beta in the web UI
# Valid but pointless combinations, with the reason; None stands for every schedule.
POINTLESS = {
    ("lcm", None): "is for networks distilled for it; others give blurred or empty pictures",
}
POINTLESS |= {
    (name, "beta_sigmas"): "leaves specks with beta_sigmas, whose last steps are large (unipc, of order 2, has fewer)"
    for name in ("unipc_bh1", "unipc_bh2")
}
POINTLESS |= {
    ("plms", name): f"assumes evenly spaced timesteps; with {name} its order falls to 1 (lms takes any spacing)"
    for name in ("karras", "exponential", "beta", "beta_sigmas", "distilled")
}
CUSTOM = "custom"  # the name of the schedule when sigmas are given


def plain(text: str) -> str:
    """The form in which names are compared: "DPM++ 2M Karras" -> "dpmpp_2m_karras"."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower().replace("+", "p")).strip("_")


SAMPLER_SPELLINGS = {
    spelling: name
    for name, row in SAMPLER_INFO.items()
    for spelling in (name, plain(row.label), *row.spellings.split())
}
SCHEDULE_SPELLINGS = {
    spelling: name
    for name, (label, spellings) in SCHEDULES.items()
    for spelling in (name, plain(label), *spellings.split())
}
OURS = {spelling: (name, False) for spelling, name in SAMPLER_SPELLINGS.items()}  # as `THEIRS`
ENDINGS = {"": ""} | {f"_{spelling}": spelling for spelling in SCHEDULE_SPELLINGS} | {"_k": "karras", "_ka": "karras"}


class Meaning(NamedTuple):
    """What a name means in the program that it is from."""

    sampler: str
    schedule: str | None  # the one that it ends in, if any
    discards: bool  # whether the last noise level but one is left out


def meaning(text: str) -> Meaning | None:
    """What any program's name of a sampler means, by our names; None if it is unknown.

    "Euler a" -> euler_a; "DPM++ 2M Karras" -> dpmpp_2m, karras; "DPM2 a" -> dpm2_a, discards; "dpm2_a" -> dpm2_a
    """
    name = re.sub(r"^(k|sample)_|_?scheduler$", "", plain(text))
    for ending, schedule in ENDINGS.items():
        if name.endswith(ending) and (found := _in_case(name.removesuffix(ending), text, OURS, THEIRS)):
            return Meaning(found[0], _in_case(schedule, text, SCHEDULE_SPELLINGS, THEIR_SCHEDULES), found[1])
    return None


def _in_case(name: str, text: str, ours: dict, theirs: dict) -> object:
    """The entry of a name: theirs where only they have it, or where the text has a capital."""
    first, second = (ours, theirs) if text == text.lower() else (theirs, ours)
    return first.get(name, second.get(name))


def schedule_name(text: str) -> str | None:
    """Our name for any program's name of a schedule; None if unknown."""
    return _in_case(re.sub(r"_?scheduler$", "", plain(text)), text, SCHEDULE_SPELLINGS, THEIR_SCHEDULES)


def objection(sampler: str, schedule: str) -> str | None:
    """Why this sampler is pointless with this schedule, as a predicate of the sampler; None if it is not.

    Both are our names.
    """
    return POINTLESS.get((sampler, None)) or POINTLESS.get((sampler, schedule))


def final_alpha(sampler: str, schedule: str, *, discards: bool = False) -> str:
    """Where the last step ends, for `sd.sampling.schedule.sampling_steps`.

    The original's two samplers with its schedule end at the first entry of the table, as in the original, and so do
    the web UI's UniPC and TCD with its authors' schedule; all others end without noise.
    """
    original = schedule == "leading" and sampler in ("ddim", "plms")
    web_ui = (sampler, schedule, discards) == ("unipc_bh1", "sgm_uniform", False)
    return "first" if original or web_ui or (sampler, schedule) == ("tcd", "distilled") else "one"
