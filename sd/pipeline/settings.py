"""The settings of a picture: checked before any weight is read, stored in the picture, shown to other tools."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from types import UnionType
from typing import TYPE_CHECKING, get_args, get_origin

from sd.config import LARGEST_SIDE, SEED_LIMIT, SMALLEST_SIDE, USUAL_GUIDANCE
from sd.pipeline.errors import SettingError, nearest, shortened
from sd.pipeline.second_pass import passes_of, second_pass_of
from sd.sampling.names import CUSTOM, SAMPLER_INFO, SCHEDULES, meaning, plain, schedule_name
from sd.text.prompt_syntax import PromptError, read_weights, timeline, without_adapters

if TYPE_CHECKING:
    from sd.text.prompt_adapters import AdapterUse

DEFAULT_STEPS = 30
IMAGE_GUIDANCE = 1.5  # of models that edit a picture: the original's
TILES = ("", "x", "y", "xy")
SWITCHES = ("time", "steps")
DEFAULT_SWITCH = 0.8  # where a refiner takes over, in diffusers' examples and in the web UI
RNGS = {"cpu": "cpu", "philox": "philox", "nv": "philox", "gpu": "philox", "cuda": "philox"}  # as others say it, too
MOST_BITS = 128  # of a whole number; the largest that a setting takes, a seed, has 64
LONGEST_PROMPT = 100_000  # characters
MOST_CHANGING = 5_000_000  # characters of a prompt that changes during the steps, over all of them
LOWEST_SIGMA, HIGHEST_SIGMA = 0.001, 10_000
RANGES = {  # lowest, highest, and what is said of others; None counts as 0
    "steps": (1, 1000, "is out of range: 1 to 1000."),
    "eta": (0, 1, "is out of range: 0 (no fresh noise) to 1 (as much as DDPM)."),
    "guidance_scale": (-1000, 1000, "is out of range: -1000 to 1000."),
    "guidance_rescale": (0, 1, "is out of range: 0 to 1."),
    "image_guidance": (0, 1000, "is out of range: 0 to 1000."),
    "reuse_features": (1, 1000, "is out of range: 1 (off: all is computed at every prediction) to 1000."),
    "merge_tokens": (0, 0.75, "is out of range: 0 (off: attention sees all tokens) to 0.75 (one in four is left)."),
    "strength": (0, 1, "is out of range: 0 (the picture as it is) to 1 (all of it is new)."),
    "seed": (0, SEED_LIMIT - 1, f"is out of range: 0 to {SEED_LIMIT - 1}."),
    **dict.fromkeys(("aesthetic_score", "negative_aesthetic_score"), (0, 10, "is out of range: 0 to 10.")),
    "switch_at": (0, 1, "is out of range: 0 to 1, the share of the base model."),
    "vary": (0, 1, "is out of range: 0 (the seed's picture) to 1 (the variation seed's)."),
    "seed_delta": (1 - SEED_LIMIT, SEED_LIMIT - 1, f"is out of range: {1 - SEED_LIMIT} to {SEED_LIMIT - 1}."),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a text-to-image run depends on apart from the model. Raises SettingError for invalid values.

    prompt, negative_prompt  what to show, and what to move away from; both may be empty; syntax as in
                             `sd.text.prompt_syntax`
    prompt_2, negative_prompt_2
                             of Stable Diffusion XL: what its second text encoder reads instead; empty: the same
    plain_prompts            brackets and BREAK in the prompts are text
    lora                     adapters beside those that the prompt names as <lora:NAME:STRENGTH>, each a text
                             "NAME[:STRENGTH[:TEXT_STRENGTH]]": of the UNet, and of the text encoder
    clip_skip                1: the text encoder's last layer; 2: the one before it, and so on
    width, height            pixels, multiples of 8
    original_size, crop      of Stable Diffusion XL: the size (width, height) that a training picture like this one had,
                             and how much of it was cut off (left, top); "1024x768" and "0,64" work, too; empty: the
                             picture's size, and nothing
    aesthetic_score, negative_aesthetic_score
                             of its refiner: how beautiful a picture to make, and to move away from, about 1 to 10
    switch_at                0 to 1: how much of the way from noise to picture is the model's; the rest is its
                             refiner's; None: all of it
    switch_by                what the way is measured in: "time", as in diffusers, or "steps", as in the web UI
    steps                    1 to 1000; None for 30, or the number of sigmas
    sampler                  any name that `sd.sampling.names` knows; it may end with the name of a schedule
    schedule                 any name of one; None for the sampler's default
    sigmas                   noise levels of the steps, falling, instead of a schedule; the step to 0 is added
    discard_penultimate      choose one noise level more, and leave out the last before the end; None: if the program
                             whose name the sampler has does so
    eta                      0 to 1, the share of fresh noise; None for the sampler's default
    guidance_scale           1 turns guidance off
    image_guidance           of models that edit a picture, how much to keep to it: 1 is as the model predicts; None for
                             others
    guidance_rescale         0 to 1, how much of the contrast added by guidance is removed
    guidance_interval        lowest and highest sigma with guidance; empty for all
    reuse_features           N: the inner blocks of the UNet run at every N-th prediction only; 1 is off
    merge_tokens             0 to 0.75, the share of tokens merged before self-attention with the most of them
    zero_terminal_snr        begin at pure noise; for models trained so, which predict v
    strength                 0 to 1, the share of the steps that run if there is an init image
    seed                     of this picture's noise
    hires                    size (width, height) of a second pass; a factor or "1024x768" works, too
    hires_upscale            what is enlarged between the passes: "latent", bilinearly, or "image", by a Lanczos filter
    hires_strength           above 0, up to 1: how much the second pass changes
    hires_steps              steps that the second pass runs; None for its strength times `steps`
    tile                     axes along which the picture tiles seamlessly: "", "x", "y" or "xy"
    vary                     0 to 1, how far the noise is rotated from the seed's to the variation seed's
    vary_seed                the variation seed; None if vary is 0
    rng                      how noise follows from a seed: "cpu", or "philox", as on an NVIDIA GPU and in the web UI;
                             their names for it, "NV", "GPU" and "cuda", work, too
    seed_delta               added to the seed for the noise that samplers add on the way, after the first

    After construction, other spellings and None are replaced by our names and by numbers.
    """

    prompt: str
    negative_prompt: str = ""
    prompt_2: str = ""
    negative_prompt_2: str = ""
    plain_prompts: bool = False
    lora: str | tuple[str, ...] = ()
    clip_skip: int = 1
    width: int
    height: int
    original_size: str | tuple[int, ...] = ()
    crop: str | tuple[int, ...] = ()
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    switch_at: float | None = None
    switch_by: str = "time"
    steps: int | None = None
    sampler: str = "dpmpp_2m"
    schedule: str | None = None
    sigmas: tuple[float, ...] = ()
    discard_penultimate: bool | None = None
    eta: float | None = None
    guidance_scale: float = USUAL_GUIDANCE
    image_guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, ...] = ()
    reuse_features: int = 1
    merge_tokens: float = 0.0
    zero_terminal_snr: bool = False
    strength: float = 1.0
    seed: int
    hires: float | str | tuple[int, ...] | None = None
    hires_upscale: str = "latent"
    hires_strength: float = 0.7
    hires_steps: int | None = None
    tile: str = ""
    vary: float = 0.0
    vary_seed: int | None = None
    rng: str = "cpu"
    seed_delta: int = 0

    def __post_init__(self):
        def check(name: str, allowed: bool, problem: str):
            if not allowed:
                raise SettingError(name, f"{getattr(self, name)} {problem}")

        for field in fields(self):
            require_type(field.name, getattr(self, field.name), field.type, type_name(field.type))
        for name in ("width", "height"):
            side = getattr(self, name)
            check(name, SMALLEST_SIDE <= side <= LARGEST_SIDE, f"is out of range: {SMALLEST_SIDE} to {LARGEST_SIDE}.")
            below = side - side % 8
            check(name, side % 8 == 0, f"is not a multiple of 8. Nearest: {below} or {below + 8}.")
        self._resolve_sampler()
        for name, (low, high, problem) in RANGES.items():
            check(name, low <= (getattr(self, name) or 0) <= high, problem)
        for name in PROMPTS:
            check_prompt(name, getattr(self, name), self.steps, plain=self.plain_prompts, adapters=name == "prompt")
        for name in ("original_size", "crop"):
            if value := getattr(self, name) or ():
                from sd.pipeline.xl_settings import pair_of_pixels

                value = pair_of_pixels(name, value)
            self._set(name, value)
        self._resolve_adapters()
        check("clip_skip", self.clip_skip >= 1, "is out of range: 1 is the last layer, 2 the one before it.")
        levels = self.steps + self.discard_penultimate
        first = 1 + (levels - 1) * (1000 // levels)
        check(
            "steps",
            self.schedule != "leading" or self.steps <= 10 or first >= 900,
            f"would begin at timestep {first} of 999 with the leading schedule, too far from pure noise. "
            "Use a number that divides 1000, or the trailing schedule.",
        )
        usual_eta = SAMPLER_INFO[self.sampler].eta
        check("eta", not self.eta or usual_eta is not None, f"does nothing: {self.sampler} has no such setting.")
        self._set("eta", usual_eta if self.eta is None or usual_eta is None else self.eta)
        check("hires", self.hires is None or self.image_guidance is None, "works only without an input image.")
        check("strength", self.strength == 1 or self.image_guidance is None,
              "does nothing: editing begins at pure noise.")  # fmt: skip
        check("guidance_rescale", not self.guidance_rescale or self.guided,
              "does nothing: guidance scale 1 turns guidance off.")  # fmt: skip
        self._resolve_interval()
        self._set("vary_seed", self.vary_seed if self.vary else None)
        if self.vary:
            check("vary", self.vary_seed is not None, "needs a variation seed: give it as vary_seed.")
            check("vary_seed", 0 <= self.vary_seed < SEED_LIMIT, RANGES["seed"][2])

        self._set("rng", RNGS.get(self.rng.lower(), self.rng))
        for name, allowed in (("tile", TILES), ("rng", dict.fromkeys(RNGS.values())), ("switch_by", SWITCHES)):
            if (value := getattr(self, name)) not in allowed:
                raise SettingError(name, f"{value:.60} {nearest(value, filter(None, allowed))}")
        if (self.hires, self.hires_upscale, self.hires_strength, self.hires_steps) != (None, "latent", 0.7, None):
            for name, value in second_pass_of(self).items():
                self._set(name, value)
        if self.hires is not None:
            try:
                self.passes()
            except SettingError as error:
                problem = f"{self.hires_steps}: the second pass is impossible: {error}"
                raise SettingError("hires_steps", problem) from None

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the only way in a frozen dataclass

    def _resolve_sampler(self) -> None:
        """Set our names for the sampler and the schedule, and the number of steps."""
        found = meaning(self.sampler)
        if found is None:
            raise SettingError("sampler", f"{self.sampler:.60} {nearest(plain(self.sampler), SAMPLER_INFO)}")
        sampler, schedule, discards = found
        if self.schedule is not None and plain(self.schedule) not in ("auto", "automatic", CUSTOM):
            asked = schedule_name(self.schedule)
            if asked is None:
                raise SettingError("schedule", f"{self.schedule:.60} {nearest(plain(self.schedule), SCHEDULES)}")
            if schedule not in (None, asked):
                raise SettingError("schedule", f"{self.schedule} does not go with the sampler {self.sampler!r}, which "
                                   f"names another one. Say {sampler} for the sampler alone.")  # fmt: skip
            schedule = asked
        elif self.schedule is not None and plain(self.schedule) == CUSTOM and not self.sigmas:
            raise SettingError("schedule", "custom needs noise levels: give them as sigmas.")
        self._set("sampler", sampler)
        self._set("sigmas", tuple(self.sigmas))
        self._set(
            "schedule", self._resolve_sigmas(schedule) if self.sigmas else schedule or SAMPLER_INFO[sampler].schedule
        )
        self._set("steps", DEFAULT_STEPS if self.steps is None else self.steps)
        if self.discard_penultimate and self.sigmas:
            raise SettingError("discard_penultimate", "does nothing with sigmas, which say every step.")
        discards = discards if self.discard_penultimate is None else self.discard_penultimate
        self._set("discard_penultimate", discards and not self.sigmas)
        if self.discard_penultimate and self.steps == 1000:
            raise SettingError("steps", "1000 leave no noise level to discard; at most 999 do.")

    def _resolve_sigmas(self, schedule: str | None) -> str:
        shown = shown_numbers(self.sigmas)
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

    def _resolve_adapters(self) -> None:
        """Set the adapters of flags as we write them, and check those of the prompt."""
        flags = (self.lora,) if isinstance(self.lora, str) else tuple(self.lora)
        if flags:
            from sd.pipeline.adapters import checked_flags

            flags = checked_flags(flags)
        self._set("lora", flags)
        _ = self.adapters

    @cached_property
    def adapters(self) -> "tuple[AdapterUse, ...]":
        """The adapters that prompt and flags name, each once with its strengths: what a model has to have applied."""
        if not self.lora and self.prompt == self.prompt_text:
            return ()
        from sd.pipeline.adapters import named_in

        return named_in(self)

    @property
    def prompt_text(self) -> str:
        """The prompt without the adapters that it names."""
        return self.prompt if self.plain_prompts else without_adapters(self.prompt)

    def _resolve_interval(self) -> None:
        self._set("guidance_interval", tuple(float(sigma) for sigma in self.guidance_interval))
        shown = shown_numbers(self.guidance_interval)
        if not self.guidance_interval:
            return
        if (
            len(self.guidance_interval) != 2
            or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] < math.inf
        ):
            raise SettingError("guidance_interval", f"{shown} is not an interval: give LOW,HIGH, such as 0.3,5.")
        if not self.guided:
            raise SettingError("guidance_interval", f"{shown} does nothing: guidance scale 1 turns guidance off.")

    def require_prediction(self, prediction: str) -> None:
        """Raise SettingError if a model that predicts "eps" or "v" cannot run with these settings."""
        if self.zero_terminal_snr and prediction != "v":
            raise SettingError(
                "zero_terminal_snr", f"needs a model that predicts v; this one predicts {prediction}. Leave it out."
            )

    @property
    def guided(self) -> bool:
        """Whether the UNet predicts for the negative prompt, too."""
        return self.guidance_scale != 1 or self.image_guidance not in (None, 1)

    @property
    def acts_inside(self) -> bool:
        """Whether parts of the UNet are patched or left out during the run, so that a compiled one cannot be used."""
        return self.reuse_features > 1 or self.merge_tokens > 0

    @property
    def shared(self) -> tuple:
        """What must be equal in all pictures of a batch: everything but prompts, seeds and variations. Adapters, too.

        With reused features, prompts must also change at the same steps, at which the whole network runs.
        """
        own = (*PROMPTS, "lora", "seed", "vary", "vary_seed")
        values = (frozenset(self.adapters), *(getattr(self, name) for name in FIELDS if name not in own))
        return values if self.reuse_features == 1 else (*values, *self._word_changes())

    def goes_with(self, other: "Settings") -> bool:
        """Whether the two pictures can be made in one batch."""
        return self.shared == other.shared

    def _word_changes(self) -> list[frozenset[int]]:
        """For each pass: the steps at which a prompt's text changes."""
        return [
            frozenset(step for texts in each.pairs_by_step() for step in changes_of(texts)) for each in self.passes()
        ]

    def passes(self) -> list["Settings"]:
        """The settings of each pass; the second one is image to image."""
        return [self] if self.hires is None else passes_of(self)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, after the last pass."""
        return self.hires or (self.width, self.height)

    @property
    def variation(self) -> tuple[int, float] | None:
        """The variation seed, and how far the noise is rotated towards it."""
        return (self.vary_seed, self.vary) if self.vary else None

    def counted_on(self, i: int) -> "Settings":
        """The settings of the i-th picture after this one: i is added to its seed, or to its variation seed."""
        if self.vary:
            return replace(self, vary_seed=self.vary_seed + i)
        return replace(self, seed=self.seed + i)

    def texts_by_step(self) -> tuple[tuple[str, ...], ...]:
        """The prompt and, with guidance, the negative prompt: the text of each at every step.

        Steps count from the first that runs. At a strength below 1, the texts of the last steps are not reached.
        """
        prompts = (self.prompt_text, self.negative_prompt) if self.guided else (self.prompt_text,)
        return tuple(timeline(prompt, self.steps, plain=self.plain_prompts) for prompt in prompts)

    def pairs_by_step(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """The same with what each of two text encoders reads."""
        lines = zip(self.texts_by_step(), (self.prompt_2, self.negative_prompt_2), strict=False)
        return tuple(
            tuple(zip(texts, timeline(second, self.steps, plain=self.plain_prompts) if second else texts, strict=True))
            for texts, second in lines
        )

    def all_texts(self) -> tuple[str, ...]:
        """Every text that the prompt and the negative prompt stand for, at any step of any pass, each once."""
        lines = (line for each in self.passes() for line in each.pairs_by_step())
        return tuple(dict.fromkeys(text for line in lines for pair in line for text in pair))

    def to_dict(self) -> dict:
        return asdict(self)


def changes_of(texts: Sequence[object]) -> list[int]:
    """The steps, counted from 0, at which the text differs from that of the previous step."""
    return [step for step, (before, now) in enumerate(pairwise(texts), 1) if before != now]


def is_of_type(value: object, kind: type) -> bool:
    """Whether a value has this type; an int counts as a float, a list as a tuple, but a bool not as a number."""
    if isinstance(kind, UnionType):
        return any(is_of_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(is_of_type(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def shown_numbers(numbers: Sequence[float]) -> str:
    """The first numbers of a list, for a message."""
    return ", ".join([f"{number:g}" for number in numbers[:12]] + ["..."] * (len(numbers) > 12))


def require_type(name: str, value: object, kind: type, expected: str) -> None:
    """Raise SettingError for a value of another type, or with a number that is too large to calculate with."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int) and number.bit_length() > MOST_BITS:
            raise SettingError(name, f"cannot be {shortened(number)}.")
    if not is_of_type(value, kind):
        raise SettingError(name, f"cannot be {shortened(value)}; it is of type {expected}.")


def type_name(kind: type) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


def check_prompt(name: str, prompt: str, steps: int, *, plain: bool = False, adapters: bool = False) -> None:
    """Raises SettingError for a prompt that is not text, is too long, or has a weight out of range at a step.

    adapters  whether it may name some
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise SettingError(name, "holds bytes that are not UTF-8 text.")
    if "\0" in prompt:
        raise SettingError(name, "holds a NUL character.")
    if len(prompt) > LONGEST_PROMPT:
        raise SettingError(name, f"has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are read.")
    if plain:
        return
    if "[" in prompt and len(prompt) * steps > MOST_CHANGING:
        raise SettingError(
            name,
            f"has {len(prompt):,} characters and may change at each of {steps} steps; at most "
            f"{MOST_CHANGING // steps:,} are read at so many steps.",
        )
    try:
        for text in dict.fromkeys(timeline(without_adapters(prompt) if adapters else prompt, steps)):
            read_weights(text)
    except PromptError as error:
        raise SettingError(name, str(error)) from None


PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
FIELDS = {field.name: field.type for field in fields(Settings)}
# What is stored in a picture beside them.
OF_THE_RUN = ("model", "refiner", "embeddings", "adapters", "family", "precision", "device", "version", "torch", "run")
