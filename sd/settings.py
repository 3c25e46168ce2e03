"""What a picture is made from: checked before any weight is read, stored in the picture, shown to other tools."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from types import UnionType
from typing import get_args, get_origin

from sd import __version__
from sd.prompts import PromptError, read_weights, timeline
from sd.sampler_names import CUSTOM, SAMPLERS, SCHEDULES, plain, sampler_name, schedule_name

DEFAULT_STEPS = 30
LARGEST_SIDE = 4096
SMALLEST_SIDE = 64
LOWEST_SIGMA, HIGHEST_SIGMA = 0.001, 10_000
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
    """A whole number will do where a float is asked for; true and false are no numbers; a list will do for a tuple."""
    if isinstance(kind, UnionType):
        return any(is_of_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(is_of_type(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def type_name(kind: type) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


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
    steps                    1 to 1000; None for 30, or as many as there are sigmas
    sampler                  any name of one that `sd.sampler_names` knows; its end may name a schedule
    schedule                 any name of one; None for the sampler's own
    sigmas                   instead of a schedule: the noise levels of the steps, falling; the step to 0 is added
    eta                      0 to 1, the share of fresh noise; None for the sampler's own
    guidance_scale           1 turns guidance off
    guidance_rescale         0 to 1, how much of the contrast that guidance adds is taken back
    zero_terminal_snr        begin at pure noise; for models trained so, which predict v
    strength                 0 to 1, the share of the steps that are run where there is a picture to begin with
    seed                     of this picture's noise
    vary                     0 to 1, how far its noise is turned from that of its seed to that of the variation seed
    vary_seed                the variation seed; None where vary is 0

    Once made, it holds our own names and numbers in place of other spellings and of None.
    """

    prompt: str
    negative_prompt: str = ""
    plain_prompts: bool = False
    clip_skip: int = 1
    width: int
    height: int
    steps: int | None = None
    sampler: str = "dpmpp_2m"
    schedule: str | None = None
    sigmas: tuple[float, ...] = ()
    eta: float | None = None
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    zero_terminal_snr: bool = False
    strength: float = 1.0
    seed: int
    vary: float = 0.0
    vary_seed: int | None = None

    def __post_init__(self):
        def check(name: str, allowed: bool, problem: str):
            if not allowed:
                raise SettingError(name, f"{getattr(self, name)} {problem}")

        for field in fields(self):
            value = getattr(self, field.name)
            if not is_of_type(value, field.type):
                raise SettingError(field.name, f"cannot be {value!r}; it is of type {type_name(field.type)}.")
        for name in ("width", "height"):
            side = getattr(self, name)
            check(name, SMALLEST_SIDE <= side <= LARGEST_SIDE, f"is out of range: {SMALLEST_SIDE} to {LARGEST_SIDE}.")
            below = side - side % 8
            check(name, side % 8 == 0, f"is not a multiple of 8. Nearest: {below} or {below + 8}.")
        self._resolve_sampler()
        check("steps", 1 <= self.steps <= 1000, "is out of range: 1 to 1000.")
        for name in ("prompt", "negative_prompt"):
            check_prompt(name, getattr(self, name), self.steps, plain=self.plain_prompts)
        check("clip_skip", self.clip_skip >= 1, "is out of range: 1 is the last layer, 2 the one before it.")
        first = 1 + (self.steps - 1) * (1000 // self.steps)
        check(
            "steps",
            self.schedule != "leading" or self.steps <= 10 or first >= 900,
            f"would begin at timestep {first} of 999 with the leading schedule, where noise is no starting point. "
            "Use a number that divides 1000, or the trailing schedule.",
        )
        usual_eta = SAMPLERS[self.sampler].eta
        check("eta", 0 <= (self.eta or 0) <= 1, "is out of range: 0 (no fresh noise) to 1 (as much as DDPM).")
        check("eta", not self.eta or usual_eta is not None, f"does nothing: {self.sampler} has no such setting.")
        self._set("eta", usual_eta if self.eta is None or usual_eta is None else self.eta)
        check("guidance_scale", abs(self.guidance_scale) <= 1000, "is out of range: -1000 to 1000.")
        check("guidance_rescale", 0 <= self.guidance_rescale <= 1, "is out of range: 0 to 1.")
        check("guidance_rescale", not self.guidance_rescale or self.guidance_scale != 1,
              "does nothing: guidance scale 1 turns guidance off.")  # fmt: skip
        check("strength", 0 <= self.strength <= 1, "is out of range: 0 (the picture as it is) to 1 (all anew).")
        check("seed", 0 <= self.seed < SEED_LIMIT, f"is out of range: 0 to {SEED_LIMIT - 1}.")
        check("vary", 0 <= self.vary <= 1, "is out of range: 0 (the seed's picture) to 1 (the variation seed's).")
        self._set("vary_seed", self.vary_seed if self.vary else None)
        if self.vary:
            check("vary", self.vary_seed is not None, "needs a variation seed: give it as vary_seed.")
            check("vary_seed", 0 <= self.vary_seed < SEED_LIMIT, f"is out of range: 0 to {SEED_LIMIT - 1}.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the only way in a frozen dataclass

    def _resolve_sampler(self) -> None:
        """Our names for the sampler and the schedule, and the number of steps."""
        found = sampler_name(self.sampler)
        if found is None:
            raise SettingError("sampler", f"{self.sampler} {nearest(plain(self.sampler), SAMPLERS)}")
        sampler, schedule = found
        if self.schedule is not None and plain(self.schedule) not in ("auto", "automatic", CUSTOM):
            asked = schedule_name(self.schedule)
            if asked is None:
                raise SettingError("schedule", f"{self.schedule} {nearest(plain(self.schedule), SCHEDULES)}")
            if schedule not in (None, asked):
                raise SettingError("schedule", f"{self.schedule} does not go with the sampler {self.sampler!r}, which "
                                   f"names another one. Say {sampler} for the sampler alone.")  # fmt: skip
            schedule = asked
        elif self.schedule is not None and plain(self.schedule) == CUSTOM and not self.sigmas:
            raise SettingError("schedule", "custom needs noise levels: give them as sigmas.")
        self._set("sampler", sampler)
        self._set("sigmas", tuple(self.sigmas))
        self._set("schedule", self._resolve_sigmas(schedule) if self.sigmas else schedule or SAMPLERS[sampler].schedule)
        self._set("steps", DEFAULT_STEPS if self.steps is None else self.steps)

    def _resolve_sigmas(self, schedule: str | None) -> str:
        shown = ", ".join(f"{sigma:g}" for sigma in self.sigmas)
        if schedule is not None:
            raise SettingError("sigmas", f"{shown} leave nothing to the {schedule} schedule. Give one of the two.")
        levels = self.sigmas[:-1] if self.sigmas[-1] == 0 else self.sigmas
        if not levels or not all(LOWEST_SIGMA <= sigma <= HIGHEST_SIGMA for sigma in levels):
            raise SettingError(
                "sigmas",
                f"{shown} are out of range: each {LOWEST_SIGMA} to {HIGHEST_SIGMA}, and a 0 at the end if you like.",
            )
        if any(later >= sooner for sooner, later in pairwise(levels)):
            raise SettingError("sigmas", f"{shown} do not fall from step to step.")
        if self.steps not in (None, len(levels)):
            raise SettingError("steps", f"{self.steps} is not the number of sigmas, {len(levels)}. Leave it out.")
        self._set("sigmas", tuple(float(sigma) for sigma in levels))
        self._set("steps", len(levels))
        return CUSTOM

    def require_prediction(self, prediction: str) -> None:
        """Raise SettingError where a model with that prediction, "eps" or "v", cannot be run with these settings."""
        if self.zero_terminal_snr and prediction != "v":
            raise SettingError(
                "zero_terminal_snr", f"needs a model that predicts v; this one predicts {prediction}. Leave it out."
            )

    def goes_with(self, other: "Settings") -> bool:
        """Whether the two pictures can be made in one batch: they differ in prompts, seeds and variations only."""
        own = ("prompt", "negative_prompt", "seed", "vary", "vary_seed")
        return self == replace(other, **{name: getattr(self, name) for name in own})

    @property
    def variation(self) -> tuple[int, float] | None:
        """The variation seed, and how far the noise is turned to it."""
        return (self.vary_seed, self.vary) if self.vary else None

    def counted_on(self, i: int) -> "Settings":
        """Those of the picture that comes i later in a run: its seed counts on, or that of its variation."""
        if self.vary:
            return replace(self, vary_seed=self.vary_seed + i)
        return replace(self, seed=self.seed + i)

    def texts_by_step(self) -> tuple[tuple[str, ...], ...]:
        """The prompt and, with guidance, the negative prompt: each as it stands at every step."""
        prompts = (self.prompt, self.negative_prompt) if self.guidance_scale != 1 else (self.prompt,)
        return tuple(timeline(prompt, self.steps, plain=self.plain_prompts) for prompt in prompts)

    def to_dict(self) -> dict:
        return asdict(self)

    def parameters(self, model_name: str, model_hash: str | None, labels: dict[str, object] | None = None) -> str:
        """The settings as one text, in the form that other tools read and write.

        labels  what else to say, by the names that other tools have for it
        """
        row = SAMPLERS[self.sampler]
        schedule = "Custom" if self.sigmas else SCHEDULES[self.schedule][0]
        values = {
            "Steps": self.steps,
            "Sampler": row.label,
            "Schedule type": None if self.schedule == row.schedule == "leading" else schedule,
            "Sigmas": ", ".join(f"{sigma:g}" for sigma in self.sigmas) or None,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Variation seed": self.vary_seed,
            "Variation seed strength": f"{self.vary:g}" if self.vary else None,
            "Model hash": model_hash,
            "Model": model_name,
            "Denoising strength": f"{self.strength:g}" if self.strength < 1 else None,
            "Eta": f"{self.eta:g}" if self.eta != row.eta else None,
            "Clip skip": self.clip_skip if self.clip_skip > 1 else None,
            "Emphasis": "None" if self.plain_prompts else None,
            "Guidance rescale": f"{self.guidance_rescale:g}" if self.guidance_rescale else None,
            "Noise Schedule": "Zero Terminal SNR" if self.zero_terminal_snr else None,
            **(labels or {}),
            "Version": f"sd-zoo {__version__}",
        }
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, line])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


FIELDS = {field.name: field.type for field in fields(Settings)}
