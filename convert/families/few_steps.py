"""Models and adapters that need only a few steps, with the settings that their authors recommend.

Nothing in their tensors says what they are for, but for one input of some UNets: they are told by name, see
`convert.families.few_step_names`. With the usual 30 steps and guidance 7.5 their pictures are burnt, which looks like a
fault of the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from convert.errors import counted, joined
from sd.config import USUAL_GUIDANCE, ModelConfig

UNEVEN = ("leading", "karras", "exponential", "beta_sigmas")  # schedules far from evenly spaced timesteps 999, ...
WITH_HISTORY = ("plms", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "unipc_bh1", "unipc_bh2")


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """What a model or an adapter for few steps is, and the settings for it. Samplers and schedules are our names."""

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
    sigma: float | None = None  # of the only step, where it is not the highest; then there is no schedule
    side: int | None = None  # of the training pictures, in pixels, where it is not the family's
    predicts: str = ""  # what its UNet predicts, where it is not what the family's does
    source: str  # the page that recommends the settings

    @property
    def flags(self) -> str:
        """On the command line."""
        levels = f"--schedule {self.schedule}" if self.sigma is None else f"--sigmas {self.sigma:g}"
        eta = "" if self.eta is None else f" --eta {self.eta:g}"
        size = "" if self.side is None else f" --width {self.side} --height {self.side}"
        return f"--sampler {self.sampler} {levels}{eta} --steps {self.steps} --guidance-scale {self.guidance:g}{size}"

    def completing(self, given: Mapping[str, object]) -> dict[str, object]:
        """The recommended settings, by name, except for what the user chose: sampler and noise levels, steps, guidance.

        given    what the user gave; empty values are defaults
        returns  None means: the sampler's own
        """
        chosen = {name for name, value in given.items() if value or name in ("eta", "guidance_scale")}
        found: dict[str, object] = {}
        if not chosen & {"sampler", "schedule", "sigmas", "eta", "discard_penultimate"}:
            found |= {"sampler": self.sampler, "schedule": self.schedule, "eta": self.eta, "discard_penultimate": None}
        if not chosen & {"steps", "sigmas"}:
            found["steps"] = self.steps
        if not chosen & {"guidance_scale", "guidance_rescale", "guidance_interval", "image_guidance"}:
            found["guidance_scale"] = self.guidance
        return found

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

# Models. The first kind is trained with guidance, whose scale is an input of the UNet. The two sigmas are those at the
# timesteps 800 and 399.
LCM_MODEL = replace(
    LCM,
    title="a latent consistency model",
    guidance=8.0,
    most_guidance=14.0,
    source=HUB + "SimianLuo/LCM_Dreamshaper_v7",
)
LCM_MERGE = replace(LCM, title="an LCM fine-tune")
SDXL_TURBO = FewSteps(
    title="SDXL Turbo",
    sampler="euler_a",
    schedule="trailing",
    steps=1,
    most=4,
    side=512,
    source=HUB + "stabilityai/sdxl-turbo",
)
SD_TURBO = replace(SDXL_TURBO, title="SD-Turbo", source=HUB + "stabilityai/sd-turbo")
TURBO_MERGE = FewSteps(
    title="an SDXL Turbo fine-tune",
    sampler="dpmpp_sde",
    schedule="karras",
    steps=6,
    fewest=4,
    guidance=2.0,
    most_guidance=2.5,
    source="https://civitai.com/models/112902",
)
LIGHTNING_MODEL = replace(LIGHTNING, title="SDXL-Lightning", schedule="trailing")
LIGHTNING_1 = replace(LIGHTNING_MODEL, title="one-step SDXL-Lightning", steps=1, most=1, predicts="x0")
LIGHTNING_MERGE = replace(TURBO_MERGE, title="an SDXL-Lightning fine-tune", steps=5, fewest=3)
HYPER_UNET = replace(HYPER_1, title="the one-step UNet of Hyper-SD", sampler="lcm", eta=None, most=1, sigma=5.11104)
HYPER_MERGE = replace(TURBO_MERGE, title="a Hyper-SD fine-tune", source=HYPER.source)
DMD2_MODEL = replace(DMD2, title="DMD2")
DMD2_1 = replace(DMD2_MODEL, title="one-step DMD2", steps=1, fewest=1, most=1, sigma=1.16058)


class PictureSettings(Protocol):
    """What of a picture's settings counts here; `sd.pipeline.settings.Settings` has it."""

    sampler: str
    schedule: str
    steps: int
    guidance_scale: float
    sigmas: tuple[float, ...]
    width: int
    height: int


COUNTING = ("steps", "sampler", "schedule", "sigmas", "guidance_scale", "width", "height")


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
    if few_steps.sigma and not settings.sigmas:
        far.append(f"the schedule {settings.schedule}")
    if few_steps.side and settings.width * settings.height > 2 * few_steps.side**2:
        far.append(f"the size {settings.width}x{settings.height}")
    if not far:
        return None
    verb = "is" if len(far) == 1 and not far[0].endswith("steps") else "are"
    return (
        f"is {few_steps.title}, and {joined(far)} {verb} far from what it is made for. Recommended: {few_steps.flags}."
    )


def usual_settings(config: ModelConfig) -> dict[str, object]:
    """The settings that pictures have unless others are asked for, where the model itself says what it is."""
    if config.unet.guidance_width:
        return {"sampler": LCM_MODEL.sampler, "steps": LCM_MODEL.steps, "guidance_scale": LCM_MODEL.guidance}
    return {} if config.guidance_scale == USUAL_GUIDANCE else {"guidance_scale": config.guidance_scale}


def with_usual(usual: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """The given settings, and the usual ones that are not given. Sigmas say how many steps there are."""
    return {name: value for name, value in usual.items() if not (name == "steps" and given.get("sigmas"))} | given
