"""Two passes: first a picture at a size for which the model was trained, then image to image on it, enlarged.

The sizes and steps of the second pass, and the number of steps at a strength. No torch needed.
"""

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from sd.config import LARGEST_SIDE
from sd.pipeline.errors import SettingError, nearest, shortened
from sd.text.prompt_syntax import second_pass_text

if TYPE_CHECKING:
    from sd.pipeline.settings import Settings

UPSCALES = {"latent": "Latent", "image": "Lanczos"}  # ours -> as other tools write it
MOST_PIXELS = 100_000  # of a side: below it, texts of sizes have at most five digits
MOST_DIFFERENT = 1.05  # ratio of the shapes of the two passes

Size = tuple[int, int]  # width, height


def steps_run(steps: int, strength: float) -> int:
    """How many of the steps run at this strength, the last ones; rounded down as in the original."""
    return int(steps * strength + 1e-9)  # 0.29 * 100 is 28.999...


def steps_for(run: int, strength: float) -> int:
    """The smallest number of steps of which at least `run` run at this strength, which is above 0."""
    steps = max(run, int(run / strength) - 1)
    while steps_run(steps, strength) < run:
        steps += 1
    return steps


def parse(value: float | str | list | tuple) -> float | Size:
    """A factor (2, "2", "2x"), or a size ("1024x768", [1024, 768]). Raises ValueError with what is allowed."""
    if isinstance(value, str):
        size = re.fullmatch(r"([0-9]{1,5})[xX×]([0-9]{1,5})", value.strip())
        factor = re.fullmatch(r"([0-9]{1,3}(\.[0-9]{1,6})?)[xX×]?", value.strip())
        if size:
            return int(size[1]), int(size[2])
        if factor:
            return float(factor[1])
    elif isinstance(value, list | tuple):
        if len(value) == 2 and all(isinstance(side, int) and abs(side) < MOST_PIXELS for side in value):
            return tuple(value)
    elif isinstance(value, int | float) and abs(value) < MOST_PIXELS:
        return float(value)
    shown = f"{value:.40}" if isinstance(value, str) else shortened(value)
    raise ValueError(f"{shown} is neither a factor such as 2 nor a size such as 1024x768.")


def second_size(value: float | str | list | tuple, width: int, height: int) -> Size:
    """The size of the second pass after a first one of this width and height. Raises ValueError for invalid ones."""
    wanted = parse(value)
    if isinstance(wanted, float):
        if not 1 < wanted <= 16:
            raise ValueError(f"{wanted:g} is out of range: a factor above 1, up to 16.")
        return 8 * round(width * wanted / 8), 8 * round(height * wanted / 8)
    shown = f"{wanted[0]}x{wanted[1]}"
    if any(side % 8 for side in wanted):
        near = "x".join(str(max(8, 8 * round(side / 8))) for side in wanted)
        raise ValueError(f"{shown} has a side that is not a multiple of 8. Nearest: {near}.")
    if wanted[0] < width or wanted[1] < height or wanted == (width, height):
        raise ValueError(f"{shown} is not larger than the first pass, {width}x{height}.")
    shape = (wanted[0] / wanted[1]) / (width / height)
    if not 1 / MOST_DIFFERENT < shape < MOST_DIFFERENT:
        raise ValueError(
            f"{shown} has another shape than the first pass, {width}x{height}. Leave width and height out, or give "
            "some of that shape."
        )
    return wanted


def first_size(value: float | str | list | tuple | None, native: int) -> Size:
    """The default size of the first pass: the shape of the second, with as many pixels as the model was trained on."""
    try:
        wanted = 1.0 if value is None else parse(value)
    except ValueError:
        wanted = 1.0  # refused with the other settings
    if isinstance(wanted, float) or min(wanted) < 1:
        return native, native
    scale = math.sqrt(native**2 / (wanted[0] * wanted[1]))
    return tuple(max(64, 8 * round(side * scale / 8)) for side in wanted)


def second_pass_of(settings: "Settings") -> dict[str, object]:
    """The settings of the second pass by name, with numbers in place of None. Raises SettingError for invalid ones."""
    if settings.hires_upscale not in UPSCALES:
        raise SettingError("hires_upscale", f"{settings.hires_upscale:.60} {nearest(settings.hires_upscale, UPSCALES)}")
    strength, steps = settings.hires_strength, settings.hires_steps
    if not 0 < strength <= 1:
        raise SettingError("hires_strength", f"{strength} is out of range: above 0, up to 1 (everything is new).")
    if settings.hires is None:
        if steps is not None:
            raise SettingError("hires_steps", f"{steps} does nothing without a second pass (hires).")
        return {"hires_upscale": "latent", "hires_strength": 0.7}
    if settings.strength < 1:
        raise SettingError("hires", "works only without an input image.")
    try:
        size = second_size(settings.hires, settings.width, settings.height)
    except ValueError as error:
        raise SettingError("hires", str(error)) from None
    if max(size) > LARGEST_SIDE:
        raise SettingError("hires", f"would be {size[0]}x{size[1]}; the largest side is {LARGEST_SIDE}.")
    usual = max(1, steps_run(settings.steps, strength))
    if settings.sigmas and steps not in (None, usual):
        raise SettingError("hires_steps", f"{steps} does nothing with sigmas, which say every step.")
    steps = usual if steps is None else steps
    if not 1 <= steps <= 1000 or steps_for(steps, strength) > 1000:
        most = steps_run(1000, strength)
        raise SettingError("hires_steps", f"{steps} is out of range: at least 1, and at this strength up to {most}.")
    return {"hires": size, "hires_steps": steps}


def passes_of(settings: "Settings") -> list["Settings"]:
    """The settings of both passes; the second one is image to image, and its prompts go on from the first."""
    first, (width, height) = replace(settings, hires=None, hires_steps=None), settings.hires
    others = ("negative_prompt", "prompt_2", "negative_prompt_2")
    texts = {"prompt": settings.prompt_text, **{name: getattr(settings, name) for name in others}}
    if not settings.plain_prompts:
        run = settings.steps, settings.hires_steps
        texts = {name: second_pass_text(text, *run) for name, text in texts.items()}
    steps = settings.steps if settings.sigmas else steps_for(settings.hires_steps, settings.hires_strength)
    strength = max(settings.hires_strength, 1 / steps)  # with sigmas, at least one step
    return [first, replace(first, width=width, height=height, steps=steps, strength=strength, **texts)]
