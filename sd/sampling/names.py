"""What samplers and schedules are called: here, in other tools, and in the settings that a picture carries."""

import re
from typing import NamedTuple


class SamplerInfo(NamedTuple):
    """What is to be known of a sampler before it runs."""

    label: str  # as other tools write it into their pictures
    schedule: str  # its own, where none is asked for
    eta: float | None  # its own share of fresh noise; None where there is no such setting
    predictions: int  # the network is asked this often a step
    spellings: str = ""  # other hands' names, as `plain` leaves them


# Samplers of the original scripts keep its schedule. The others have the one that they are usually run with: even
# timesteps where none is usual, Karras's or an exponential one for the solvers of order 2.
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
SCHEDULES = {  # ours -> as other tools write it, and other hands' names
    "leading": ("DDIM", "ddim_uniform"),
    "trailing": ("Trailing", ""),
    "linspace": ("Uniform", "normal"),
    "karras": ("Karras", ""),
    "exponential": ("Exponential", ""),
    "sgm_uniform": ("SGM Uniform", "sgm"),
    "simple": ("Simple", ""),
    "beta": ("Beta", ""),
}
# Pairs that run as all others do, and that nobody should choose, with the reason; None stands for every schedule.
SENSELESS = {
    ("lcm", None): "is for networks distilled for it; with others, pictures are blurred or plain",
    ("plms", "karras"): "has weights for timesteps at one distance; at others its order is 1 (lms has weights for all)",
}
SENSELESS |= dict.fromkeys([("plms", "exponential"), ("plms", "beta")], SENSELESS["plms", "karras"])
CUSTOM = "custom"  # the schedule of those who give sigmas of their own


def plain(text: str) -> str:
    """How names are compared: "DPM++ 2M Karras" is "dpmpp_2m_karras"."""
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
    """Ours for anybody's name of a sampler, with the schedule that the name ends in, if it does; None for no name.

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
    """Ours for anybody's name of a schedule; None for no name."""
    return SCHEDULE_SPELLINGS.get(re.sub(r"_?scheduler$", "", plain(text)))


def objection(sampler: str, schedule: str) -> str | None:
    """Why a sampler should not be used with a schedule, after the sampler's name; None where nothing speaks against it.

    Both by our own names.
    """
    return SENSELESS.get((sampler, None)) or SENSELESS.get((sampler, schedule))


def final_alpha(sampler: str, schedule: str) -> str:
    """Where the last step leads, as `sd.sampling.schedule.sampling_steps` calls it.

    The original's two samplers with its schedule end at the first entry of the table, as they do there; everything else
    ends without noise.
    """
    return "first" if schedule == "leading" and sampler in ("ddim", "plms") else "one"
