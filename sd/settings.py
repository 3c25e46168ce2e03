"""What a picture is made from: checked before any weight is read, stored in the picture, shown to other tools."""

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sd import __version__

SAMPLER_NAMES = {"ddim": "DDIM", "ddpm": "DDPM"}  # ours -> as other tools write it
SPACING_NAMES = {"leading": "Leading", "trailing": "Trailing", "linspace": "Linspace"}
LARGEST_SIDE = 4096
SMALLEST_SIDE = 64
SEED_LIMIT = 2**63  # seeds are below it; torch's generators take no larger ones


class SettingError(ValueError):
    """A setting that cannot be: its name, and what is wrong with it and what is allowed."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist: the nearest one that does, and all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given.lower(), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"does not exist.{hint} There are: {', '.join(names)}."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a text-to-picture run depends on beside the model. Raises SettingError for what cannot be.

    prompt, negative_prompt  what to show, and what to move away from; both may be empty
    width, height            pixels, multiples of 8
    steps                    1 to 1000
    sampler, spacing         names of `sd.samplers.SAMPLERS` and `sd.schedule.SPACINGS`
    eta                      0 to 1, fresh noise in DDIM
    guidance_scale           1 turns guidance off
    seed                     of this picture's noise
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    steps: int = 30
    sampler: str = "ddim"
    spacing: str = "leading"
    eta: float = 0.0
    guidance_scale: float = 7.5
    seed: int

    def __post_init__(self):
        def check(name: str, allowed: bool, problem: str):
            if not allowed:
                raise SettingError(name, f"{getattr(self, name)} {problem}")

        for name in ("width", "height"):
            side = getattr(self, name)
            below = side - side % 8
            check(name, side % 8 == 0, f"is not a multiple of 8. Nearest: {below} or {below + 8}.")
            check(name, SMALLEST_SIDE <= side <= LARGEST_SIDE, f"is out of range: {SMALLEST_SIDE} to {LARGEST_SIDE}.")
        check("steps", 1 <= self.steps <= 1000, "is out of range: 1 to 1000.")
        check("sampler", self.sampler in SAMPLER_NAMES, nearest(self.sampler, SAMPLER_NAMES))
        check("spacing", self.spacing in SPACING_NAMES, nearest(self.spacing, SPACING_NAMES))
        check("eta", 0 <= self.eta <= 1, "is out of range: 0 (no fresh noise) to 1 (as much as DDPM).")
        check("eta", not self.eta or self.sampler == "ddim", f"does nothing: {self.sampler} has no such setting.")
        check("guidance_scale", math.isfinite(self.guidance_scale), "is not a finite number.")
        check("seed", 0 <= self.seed < SEED_LIMIT, f"is out of range: 0 to {SEED_LIMIT - 1}.")

    def to_dict(self) -> dict:
        return asdict(self)

    def parameters(self, model_name: str, model_hash: str | None) -> str:
        """The settings as one text, in the form that other tools read and write."""
        values = {
            "Steps": self.steps,
            "Sampler": SAMPLER_NAMES[self.sampler],
            "Schedule type": SPACING_NAMES[self.spacing] if self.spacing != "leading" else None,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": model_hash,
            "Model": model_name,
            "Eta": f"{self.eta:g}" if self.eta else None,
            "Version": f"sd-zoo {__version__}",
        }
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, line])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
