"""Settings that only some models read, most of them XL: their values, and which models they go with. Without torch."""

import re
from typing import TYPE_CHECKING

from sd.config import SDXL_REFINER
from sd.pipeline.errors import SettingError, shortened

if TYPE_CHECKING:
    from sd.config import ModelConfig
    from sd.pipeline.settings import Settings

MOST_PIXELS = 99_999
REFINER = SDXL_REFINER.family
FORMS = {"original_size": ("x", "WIDTHxHEIGHT, such as 1024x768", 1), "crop": (",", "LEFT,TOP, such as 0,64", 0)}
NEEDS = {  # settings -> what of a model reads them
    "prompt_2": "two text encoders",
    "negative_prompt_2": "two text encoders",
    "original_size": "sizes",
    "crop": "sizes",
    "aesthetic_score": "a score",
    "negative_aesthetic_score": "a score",
}
WHOSE = {
    "two text encoders": "a model with two text encoders, such as Stable Diffusion XL",
    "sizes": "a model of Stable Diffusion XL, which is told of sizes",
    "a score": "the refiner of Stable Diffusion XL",
}


def pair_of_pixels(name: str, value: str | list | tuple) -> tuple[int, ...]:
    """A size (width, height) or a place (left, top), also as a text. Raises SettingError."""
    mark, form, lowest = FORMS[name]
    pair = tuple(value)
    if isinstance(value, str):
        found = re.fullmatch(rf"\s*([0-9]{{1,5}})\s*{mark}\s*([0-9]{{1,5}})\s*", value, re.IGNORECASE)
        pair = (int(found[1]), int(found[2])) if found else ()
    if not (len(pair) == 2 and all(lowest <= side <= MOST_PIXELS for side in pair)):
        shown = f"{value:.40}" if isinstance(value, str) else shortened(value)
        raise SettingError(name, f"{shown} is not {form}, each {lowest} to {MOST_PIXELS}.")
    return pair


def require_readers(settings: "Settings", config: "ModelConfig", refiner: "ModelConfig | None" = None) -> None:
    """Raise SettingError for a setting that neither the model nor its refiner reads."""
    read = set()
    for each in filter(None, (config, refiner)):
        read |= {"sizes"} if each.unet.vector_width else set()
        read |= {"two text encoders"} if each.text_encoder_2 else {"a score"} if each.unet.vector_width else set()
    defaults = type(settings).__dataclass_fields__
    for name, needed in NEEDS.items():
        if getattr(settings, name) != defaults[name].default and needed not in read:
            raise SettingError(name, f"does nothing here: it is for {WHOSE[needed]}. This is {config.family}.")


def require_model_for(settings: "Settings", config: "ModelConfig") -> None:
    """Raise SettingError for a setting that has no meaning with how the model was trained."""
    if settings.zero_terminal_snr and config.schedule.sigma_max:
        raise SettingError("zero_terminal_snr", "does nothing: this model has no timesteps. Leave it out.")
    for name in ("guidance_rescale", "guidance_interval") if config.unet.guidance_width else ():
        if getattr(settings, name):
            raise SettingError(name, "does nothing: this model takes the guidance scale as an input. Leave it out.")


def require_pair(base: "ModelConfig", refiner: "ModelConfig") -> None:
    """Raise SettingError unless the second model is the refiner of the first."""
    if refiner.family != REFINER:
        raise SettingError("refiner", f"must be the refiner of Stable Diffusion XL; this is {refiner.family}.")
    if not base.text_encoder_2 or base.vae.latent_scale != refiner.vae.latent_scale:
        raise SettingError("refiner", f"goes with a base model of Stable Diffusion XL; this one is {base.family}.")
