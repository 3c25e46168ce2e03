"""The settings that make a picture again, from the texts that it carries."""

from collections.abc import Mapping
from dataclasses import fields

from sd.pipeline.image.input_settings import InputSettings
from sd.pipeline.settings import Settings

FIRST = ("prompt", "negative_prompt", "steps", "sampler", "schedule", "guidance_scale", "seed", "width", "height")


def settings_again(texts: Mapping[str, str]) -> dict[str, object]:
    """Of a picture of ours: the settings that every picture has, and others that are not the default.

    Without the size of a picture that was made from another one, and had its size.
    """
    from sd.pipeline.image.metadata import exact_in

    exact = exact_in(dict(texts))
    defaults = {field.name: field.default for kind in (Settings, InputSettings) for field in fields(kind)}
    names = [*FIRST, *(name for name in defaults if name not in FIRST)]
    again = {name: exact[name] for name in names if name in exact}
    from_picture = "init" in exact
    if from_picture and "Resize mode: " not in texts.get("parameters", ""):
        again = {name: value for name, value in again.items() if name not in ("width", "height")}
    kept = (*FIRST, "strength") if from_picture else FIRST

    def is_default(name: str) -> bool:
        value = again[name]
        return (tuple(value) if isinstance(value, list) else value) == defaults[name]

    return {name: value for name, value in again.items() if name in kept or not is_default(name)}
