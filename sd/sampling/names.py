"""Samplers and schedules by name: ours, other programs', and those in the settings that a picture carries."""

import re
from typing import NamedTuple


class SamplerInfo(NamedTuple):
    """What settings need to know about a sampler."""

    label: str  # as other programs write it into their pictures
    schedule: str  # the default
    eta: float | None  # the default share of fresh noise; None for samplers without eta
    predictions: int  # by the network in one step
    spellings: str = ""  # other programs' names, in the form that `plain` returns


# Default schedules: the original scripts' for the samplers in them; for the others the usual one, which is Karras's or
# an exponential one for solvers of order 2 and even timesteps otherwise.
SAMPLER_INFO = {
    "ddim": SamplerInfo("DDIM", "leading", 0.0, 1),
    "ddpm": SamplerInfo("DDPM", "leading", None, 1),
    "plms": SamplerInfo("PLMS", "leading", None, 1, "pndm"),
    "euler": SamplerInfo("Euler", "linspace", None, 1, "eulerdiscrete"),
    "euler_a": SamplerInfo("Euler a", "linspace", 1.0, 1, "euler_ancestral eulera eulerancestraldiscrete"),
    "heun": SamplerInfo("Heun", "linspace", None, 2, "heundiscrete"),
    "lms": SamplerInfo("LMS", "linspace", None, 1, "lmsdiscrete"),
    "dpm2": SamplerInfo("DPM2", "karras", None, 2, "dpm_2 kdpm2discrete kdpm_2"),
    "dpm2_a": SamplerInfo("DPM2 a", "karras", 1.0, 2, "dpm_2_a dpm2_ancestral dpm_2_ancestral kdpm2ancestraldiscrete"),
    "dpmpp_2s_a": SamplerInfo("DPM++ 2S a", "karras", 1.0, 2, "dpmpp_2s_ancestral dpmpp2sa"),
    "dpmpp_2m": SamplerInfo(
        "DPM++ 2M", "karras", None, 1, "dpm_solver dpmsolver dpmsolverpp dpm_solverpp dpmpp dpmpp2m dpmsolvermultistep"
    ),
    "dpmpp_sde": SamplerInfo("DPM++ SDE", "karras", 1.0, 2, "dpmpp_sde_gpu dpmppsde dpmsolversde"),
    "dpmpp_2m_sde": SamplerInfo("DPM++ 2M SDE", "exponential", 1.0, 1, "dpmpp_2m_sde_gpu dpmpp2msde sde_dpmsolverpp"),
    "unipc": SamplerInfo("UniPC", "sgm_uniform", None, 1, "uni_pc uni_pc_bh2 unipcmultistep"),
    "lcm": SamplerInfo("LCM", "trailing", None, 1),
}
SCHEDULES = {  # our name -> the label that other programs write, and other names
    "leading": ("DDIM", "ddim_uniform"),
    "trailing": ("Trailing", ""),
    "linspace": ("Uniform", "normal"),
    "karras": ("Karras", ""),
    "exponential": ("Exponential", ""),
    "sgm_uniform": ("SGM Uniform", "sgm"),
    "simple": ("Simple", ""),
    "beta": ("Beta", ""),
}
# Valid but pointless combinations, with the reason; None stands for every schedule.
POINTLESS = {
    ("lcm", None): "is for networks distilled for it; others give blurred or empty pictures",
    ("plms", "karras"): "assumes evenly spaced timesteps; with others its order falls to 1 (lms takes any spacing)",
}
POINTLESS |= dict.fromkeys([("plms", "exponential"), ("plms", "beta")], POINTLESS["plms", "karras"])
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


def sampler_name(text: str) -> tuple[str, str | None] | None:
    """Our name for any program's name of a sampler, and the schedule that it ends in, if any; None if unknown.

    "Euler a" -> ("euler_a", None), "DPM++ 2M Karras" -> ("dpmpp_2m", "karras"), "k_euler_a" -> ("euler_a", None)
    """
    name = re.sub(r"^(k|sample)_|_?scheduler$", "", plain(text))
    if name in SAMPLER_SPELLINGS:
        return SAMPLER_SPELLINGS[name], None
    for ending, schedule in {**SCHEDULE_SPELLINGS, "k": "karras", "ka": "karras"}.items():
        sampler = SAMPLER_SPELLINGS.get(name.removesuffix(f"_{ending}"))
        if sampler:
            return sampler, schedule
    return None


def schedule_name(text: str) -> str | None:
    """Our name for any program's name of a schedule; None if unknown."""
    return SCHEDULE_SPELLINGS.get(re.sub(r"_?scheduler$", "", plain(text)))


def objection(sampler: str, schedule: str) -> str | None:
    """Why this sampler is pointless with this schedule, as a predicate of the sampler; None if it is not.

    Both are our names.
    """
    return POINTLESS.get((sampler, None)) or POINTLESS.get((sampler, schedule))


def final_alpha(sampler: str, schedule: str) -> str:
    """Where the last step ends, for `sd.sampling.schedule.sampling_steps`.

    The original's two samplers with its schedule end at the first entry of the table, as in the original; all others
    end without noise.
    """
    return "first" if schedule == "leading" and sampler in ("ddim", "plms") else "one"
