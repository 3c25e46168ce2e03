"""Two models in a row: a base model takes the first steps, from most of the noise, and its refiner the last ones.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023), section 2.5, call
this the refinement stage; the hand-over without new noise is that of an ensemble of experts, each for its noise levels:
Balaji et al., "eDiff-I" (2022), section 4.
"""

from typing import TYPE_CHECKING

from sd.pipeline.conditions import Conditions, conditions_for
from sd.pipeline.errors import SettingError
from sd.pipeline.settings import Settings
from sd.pipeline.xl_settings import require_pair
from sd.sampling.init_image import InitImage
from sd.sampling.schedule import Steps

if TYPE_CHECKING:
    from sd.pipeline.latent_diffusion import LatentDiffusion


def first_refined(steps: Steps, settings: Settings) -> int:
    """The number of the first step, counted from 0, that is the refiner's; all steps without a refiner.

    Raises SettingError if one of the two models gets no step.
    """
    if settings.switch_at is None:
        return len(steps)
    if settings.switch_by == "steps":
        first = int(settings.switch_at * len(steps) + 1e-9)
    else:
        total = len(steps.table)
        first = sum(bool(step.timestep >= round(total - settings.switch_at * total)) for step in steps)
    if first in (0, len(steps)):
        idle = "the base model" if first == 0 else "the refiner"
        raise SettingError("switch_at", f"{settings.switch_at:g} leaves no step to {idle}: there are {len(steps)}.")
    return first


def shares_of(
    base: "LatentDiffusion",
    init: InitImage | None,
    conditions: Conditions,
    steps: Steps,
    skipped: int,
    settings: Settings,
) -> "list[tuple[LatentDiffusion, Conditions, range]]":
    """Who takes which steps of a run: the base model, its refiner, or one after the other.

    init, conditions  of the base model's run
    skipped           how many steps do not run: image to image may begin with the refiner
    """
    refiner = base.refiner
    if refiner is None:
        raise SettingError("switch_at", f"{settings.switch_at:g} needs a refiner to switch to.")
    require_pair(base.config, refiner.config)
    switch = max(skipped, first_refined(steps, settings))
    theirs = conditions_for(refiner.config, init, lambda _: conditions.x_0)
    shares = [(base, conditions, range(skipped, switch)), (refiner, theirs, range(switch, len(steps)))]
    return [share for share in shares if share[2]]
