"""What a picture is made from: checked before any weight is read, stored in the picture, shown to other tools."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from sd import __version__
from sd.prompts import PromptError, read_weights, timeline

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


def is_of_type(value: object, kind: type) -> bool:
    """A whole number will do where a float is asked for; true and false are no numbers."""
    if kind is bool:
        return isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def check_prompt(name: str, prompt: str, steps: int, *, plain: bool = False) -> None:
    """Raises SettingError for a prompt that is no text, or has a weight out of range at one of its steps."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise SettingError(name, "holds bytes that are no UTF-8 text.")
    if "\0" in prompt:
        raise SettingError(name, "holds a NUL character.")
    if plain:
        return
    try:
        for text in dict.fromkeys(timeline(prompt, steps)):
            read_weights(text)
    except PromptError as error:
        raise SettingError(name, str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a text-to-picture run depends on beside the model. Raises SettingError for what cannot be.

    prompt, negative_prompt  what to show, and what to move away from; both may be empty; syntax as in `sd.prompts`
    plain_prompts            brackets and BREAK in the prompts are text
    clip_skip                1: the text encoder's last layer; 2: the one before it, and so on
    width, height            pixels, multiples of 8
    steps                    1 to 1000
    sampler, spacing         names of `sd.samplers.SAMPLERS` and `sd.schedule.SPACINGS`
    eta                      0 to 1, fresh noise in DDIM
    guidance_scale           1 turns guidance off
    seed                     of this picture's noise
    """

    prompt: str
    negative_prompt: str = ""
    plain_prompts: bool = False
    clip_skip: int = 1
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

        for field in fields(self):
            value = getattr(self, field.name)
            if not is_of_type(value, field.type):
                raise SettingError(field.name, f"cannot be {value!r}; it is of type {field.type.__name__}.")
        for name in ("width", "height"):
            side = getattr(self, name)
            check(name, SMALLEST_SIDE <= side <= LARGEST_SIDE, f"is out of range: {SMALLEST_SIDE} to {LARGEST_SIDE}.")
            below = side - side % 8
            check(name, side % 8 == 0, f"is not a multiple of 8. Nearest: {below} or {below + 8}.")
        check("steps", 1 <= self.steps <= 1000, "is out of range: 1 to 1000.")
        for name in ("prompt", "negative_prompt"):
            check_prompt(name, getattr(self, name), self.steps, plain=self.plain_prompts)
        check("clip_skip", self.clip_skip >= 1, "is out of range: 1 is the last layer, 2 the one before it.")
        check("sampler", self.sampler in SAMPLER_NAMES, nearest(self.sampler, SAMPLER_NAMES))
        check("spacing", self.spacing in SPACING_NAMES, nearest(self.spacing, SPACING_NAMES))
        first = 1 + (self.steps - 1) * (1000 // self.steps)
        check(
            "steps",
            self.spacing != "leading" or self.steps <= 10 or first >= 900,
            f"would begin at timestep {first} of 999 with the leading schedule, where noise is no starting point. "
            "Use a number that divides 1000, or the trailing schedule.",
        )
        check("eta", 0 <= self.eta <= 1, "is out of range: 0 (no fresh noise) to 1 (as much as DDPM).")
        check("eta", not self.eta or self.sampler == "ddim", f"does nothing: {self.sampler} has no such setting.")
        check("guidance_scale", abs(self.guidance_scale) <= 1000, "is out of range: -1000 to 1000.")
        check("seed", 0 <= self.seed < SEED_LIMIT, f"is out of range: 0 to {SEED_LIMIT - 1}.")

    def goes_with(self, other: "Settings") -> bool:
        """Whether the two pictures can be made in one batch: they differ in prompts and seeds only."""
        return self == replace(other, prompt=self.prompt, negative_prompt=self.negative_prompt, seed=self.seed)

    def texts_by_step(self) -> tuple[tuple[str, ...], ...]:
        """The prompt and, with guidance, the negative prompt: each as it stands at every step."""
        prompts = (self.prompt, self.negative_prompt) if self.guidance_scale != 1 else (self.prompt,)
        return tuple(timeline(prompt, self.steps, plain=self.plain_prompts) for prompt in prompts)

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
            "Clip skip": self.clip_skip if self.clip_skip > 1 else None,
            "Emphasis": "None" if self.plain_prompts else None,
            "Version": f"sd-zoo {__version__}",
        }
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, line])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
