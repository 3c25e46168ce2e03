"""Adapters that need only a few steps: recognised by name, with the settings that their authors recommend.

Such an adapter is an ordinary LoRA; nothing in its tensors says what it is for. With the usual 30 steps and guidance
7.5 its pictures are burnt, which looks like a fault of the file.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from convert.errors import counted, joined

NAMES = ("ss_output_name", "modelspec.title", "name")  # metadata that name the adapter
SENTENCES = ("ss_training_comment", "modelspec.description")  # metadata that may mention other adapters
LONGEST = 200  # characters of a text that are looked at
STEP_COUNTS = (1, 2, 4, 8, 12, 16)  # adapters for a number of steps have it in their names
UNEVEN = ("leading", "karras", "exponential", "beta_sigmas")  # schedules far from evenly spaced timesteps 999, ...
WITH_HISTORY = ("plms", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "unipc_bh1", "unipc_bh2")


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """What an adapter for few steps is, and the settings for it. Samplers and schedules are our names."""

    title: str
    sampler: str
    schedule: str
    steps: int
    fewest: int = 1
    most: int = 8
    guidance: float = 1.0  # 1 is off; diffusers' pages write 0 or 1
    least_guidance: float = 1.0
    most_guidance: float = 1.0
    eta: float | None = None
    consistent: bool = False  # predicts x_0 from any timestep, so the schedule is free, and the solver is not
    for_pictures: bool = True
    source: str  # the page that recommends the settings

    @property
    def flags(self) -> str:
        """On the command line."""
        eta = "" if self.eta is None else f" --eta {self.eta:g}"
        return (
            f"--sampler {self.sampler} --schedule {self.schedule}{eta} --steps {self.steps} "
            f"--guidance-scale {self.guidance:g}"
        )

    @property
    def sentence(self) -> str:
        """One sentence whose subject is the file."""
        if not self.for_pictures:
            return f"is {self.title}, for videos: it belongs to a motion module, which is not supported."
        return f"is {self.title}, for pictures in few steps. Recommended: {self.flags}."


HUB = "https://huggingface.co/"
LCM = FewSteps(
    title="an LCM-LoRA",
    sampler="lcm",
    schedule="distilled",
    steps=4,
    fewest=2,
    most_guidance=2.0,
    consistent=True,
    source=HUB + "latent-consistency/lcm-lora-sdv1-5",
)
TCD = replace(
    LCM,
    title="a TCD-LoRA",
    sampler="tcd",
    eta=0.3,
    most=50,
    most_guidance=1.0,
    source=HUB + "h1t/TCD-SDXL-LoRA",
)
FLASH = replace(LCM, title="a Flash Diffusion LoRA", most=4, most_guidance=1.0, source=HUB + "jasperai/flash-sdxl")
DMD2 = replace(
    LCM,
    title="a DMD2 LoRA",
    schedule="trailing",  # 999, 749, 499, 249
    fewest=4,
    most=4,
    most_guidance=1.0,
    source=HUB + "tianweiy/DMD2",
)
ANIMATE = replace(LCM, title="AnimateLCM", for_pictures=False, source=HUB + "wangfuyun/AnimateLCM")
LIGHTNING = FewSteps(
    title="an SDXL-Lightning LoRA",
    sampler="euler",
    schedule="sgm_uniform",
    steps=4,
    source=HUB + "ByteDance/SDXL-Lightning",
)
HYPER = FewSteps(
    title="a Hyper-SD LoRA",
    sampler="ddim",
    schedule="trailing",
    steps=8,
    source=HUB + "ByteDance/Hyper-SD",
)
HYPER_1 = replace(
    HYPER, title="a one-step Hyper-SD LoRA", sampler="tcd", schedule="distilled", eta=1.0, steps=1, consistent=True
)
HYPER_CFG = replace(HYPER, title="a Hyper-SD CFG LoRA", guidance=5.0, least_guidance=5.0, most_guidance=8.0)
TURBO = FewSteps(
    title="a Turbo LoRA",
    sampler="euler_a",
    schedule="sgm_uniform",
    steps=4,
    most_guidance=2.5,
    source="https://civitai.com/models/215485; " + HUB + "stabilityai/sdxl-turbo",
)
PCM = FewSteps(
    title="a PCM LoRA",
    sampler="ddim",
    schedule="trailing",
    steps=4,
    most=16,
    most_guidance=2.0,
    source=HUB + "wangfuyun/PCM_Weights",
)
PCM_NORMAL = replace(PCM, title="a PCM LoRA for normal guidance", guidance=3.0, least_guidance=2.0, most_guidance=9.0)
PCM_LCM = replace(LCM, title="an LCM-like PCM LoRA", source=PCM.source)

# What a name must have, as `words` gives it: in lower case, letters and digits apart, "hyper sd 15 8 steps lora".
# The words are also ordinary ones (lightning, flash, turbo, hyper), so none is enough alone.
STEPS = re.compile(r"\b(\d+) steps?\b")
PATTERNS = tuple(
    (re.compile(text), kind, fixed)  # fixed: is for the number of steps in its name, and must name one
    for text, kind, fixed in (
        (r"\banimate ?lcm\b|\banimate ?diff\b.*\blcm\b", ANIMATE, False),
        (r"\bpcm\b.*\blcm ?like\b", PCM_LCM, False),
        (r"\bpcm\b.*\bnormal ?cfg\b", PCM_NORMAL, True),
        (r"\bpcm\b.*\bsmall ?cfg\b", PCM, True),
        (r"\bdmd ?2\b", DMD2, False),
        (r"^flash ?sd(xl)?( lora)?$|\bflash ?diffusion\b", FLASH, False),
        (r"\btcd\b.*\b(sd(xl)?|lora)\b|\bsd(xl)?( \d+)* tcd\b", TCD, False),
        (r"\bhyper ?sd(xl)?\b.*\bcfg\b", HYPER_CFG, True),
        (r"\bhyper ?sd(xl)?\b", HYPER, True),
        (r"\blightning\b", LIGHTNING, True),
        (r"\bsd ?(xl ?)?turbo( \d+)*( lora\b|$)", TURBO, False),
        (r"\blcm ?(lora|sd(v|xl)?|ssd|xl)\b|\b(sd(v|xl)?|ssd|xl|lora)( \d+)* lcm\b|^lcm$", LCM, False),
    )
)


def words(text: str) -> str:
    """The form in which names are compared: "Hyper-SD15-8steps-lora" -> "hyper sd 15 8 steps lora"."""
    return " ".join(re.findall(r"[a-z]+|[0-9]+", text[:LONGEST].lower()))


def advice(name: str, metadata: Mapping[str, str]) -> FewSteps | None:
    """What the adapter is, if it is one for few steps; None for all others.

    name      of the file, without its suffix, or of the folder that holds it
    metadata  of the file
    """
    for text, from_start in _texts(name, metadata):
        for pattern, kind, fixed in PATTERNS:
            found = pattern.search(text)
            if not found or (from_start and found.start() > len("sd xl ")):
                continue
            count = next((int(number) for number in STEPS.findall(text) if int(number) in STEP_COUNTS), None)
            if not fixed:
                return kind
            if count == 1 and kind is HYPER:
                return HYPER_1
            if count:
                return replace(kind, title=f"{kind.title} ({count} steps)", steps=count, fewest=count, most=count)
    return None


def _texts(name: str, metadata: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """Texts that name the adapter, and whether only their beginning does: sentences mention other adapters, too."""
    yield words(name), False
    yield from ((words(metadata[key]), False) for key in NAMES if key in metadata)
    yield from ((words(metadata[key]), True) for key in SENTENCES if key in metadata)


class PictureSettings(Protocol):
    """What of a picture's settings counts here; `sd.pipeline.settings.Settings` has it."""

    sampler: str
    schedule: str
    steps: int
    guidance_scale: float


def objection(few_steps: FewSteps, settings: PictureSettings) -> str | None:
    """What is far from the recommended settings, as a sentence whose subject is the file; None if nothing is.

    settings  by our names, with the defaults put in

    Near enough is: twice the steps, guidance higher by 1 or lower by 2, and any solver that copes with so few steps.
    """
    if not few_steps.for_pictures:
        return few_steps.sentence
    far = []
    if settings.steps > max(2 * few_steps.most, few_steps.most + 8) or settings.steps < 0.6 * few_steps.fewest:
        far.append(counted(settings.steps, "step"))
    if not few_steps.least_guidance - 2 <= settings.guidance_scale <= few_steps.most_guidance + 1:
        far.append(f"guidance scale {settings.guidance_scale:g}")
    if few_steps.consistent and settings.sampler in WITH_HISTORY:
        far.append(f"the sampler {settings.sampler}")
    if not few_steps.consistent and settings.schedule in UNEVEN and settings.sampler != "dpmpp_sde":
        far.append(f"the schedule {settings.schedule}")
    if not far:
        return None
    verb = "is" if len(far) == 1 and not far[0].endswith("steps") else "are"
    return (
        f"is {few_steps.title}, and {joined(far)} {verb} far from what it is made for. Recommended: {few_steps.flags}."
    )
