"""The text that image generators write into pictures, written from our settings and read as them.

    a photograph of a horse
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.7

`parameters_of` writes it; `settings_in` reads ours and that of other tools.
"""

import json
import re
from dataclasses import dataclass, field

from sd import __version__
from sd.pipeline.errors import SettingError
from sd.pipeline.second_pass import UPSCALES
from sd.pipeline.settings import Settings
from sd.sampling.names import SAMPLER_INFO, SCHEDULES, meaning, schedule_name


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


VALUES = {  # as other tools write it -> our name, and its type
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Sigmas": ("sigmas", _floats),
    "Clip skip": ("clip_skip", int),
    "Eta": ("eta", float),
    "Guidance rescale": ("guidance_rescale", float),
    "Guidance interval": ("guidance_interval", _floats),
    "Reuse features": ("reuse_features", int),
    "Token merging ratio": ("merge_tokens", float),
    "Variation seed": ("vary_seed", int),
    "Variation seed strength": ("vary", float),
    "Denoising strength": ("strength", float),
    "Hires upscale": ("hires", str),
    "Hires resize": ("hires", str),
    "Hires steps": ("hires_steps", int),
    "ENSD": ("seed_delta", int),
}
CHOICES = {  # as other tools write it -> our name, and our value for each of theirs; None is the default
    "Tiling": ("tile", {"True": "xy", "False": None, "x": "x", "y": "y"}),
    "Emphasis": ("plain_prompts", {"None": True, "Original": None}),
    "Noise Schedule": ("zero_terminal_snr", {"Zero Terminal SNR": True, "Default": None}),
    "Discard penultimate sigma": ("discard_penultimate", {"True": True, "False": None}),
    "RNG": ("rng", {"CPU": "cpu", "NV": "philox", "GPU": "philox", "cpu": "cpu", "cuda": "philox"}),
}
OUR_NAMES = {  # by the labels that we write
    "Sampler": {row.label: name for name, row in SAMPLER_INFO.items()},
    "Schedule type": {label: name for name, (label, _) in SCHEDULES.items()},
}
# Not settings: these do not change the picture.
NO_SETTINGS = ("Version", "Model", "Model hash", "Batch size", "Batch pos")
WEB_UI = re.compile(r"[vf]?[0-9]+\.[0-9]")  # how its versions, and those of its fork Forge, begin
EXTRA_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,100}>")


@dataclass
class Found:
    """Settings by our names; each part of a text that could not be used, in a few words; what is worth knowing."""

    settings: dict = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was chosen where the text says nothing


def parameters_of(
    settings: Settings, model_name: str, model_hash: str | None, labels: dict[str, object] | None = None
) -> str:
    """The settings as one text, in the form that other tools read and write.

    labels  further values, by the names that other tools use
    """
    row = SAMPLER_INFO[settings.sampler]
    schedule = "Custom" if settings.sigmas else SCHEDULES[settings.schedule][0]
    values = {
        "Steps": settings.steps,
        "Sampler": row.label,
        "Schedule type": None if settings.schedule == row.schedule == "leading" else schedule,
        "Discard penultimate sigma": settings.discard_penultimate or None,
        "Sigmas": ", ".join(f"{sigma:g}" for sigma in settings.sigmas) or None,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Tiling": {"": None, "xy": True}.get(settings.tile, settings.tile),
        "Variation seed": settings.vary_seed,
        "Variation seed strength": f"{settings.vary:g}" if settings.vary else None,
        "ENSD": settings.seed_delta or None,
        "RNG": "NV" if settings.rng == "philox" else None,
        "Model hash": model_hash,
        "Model": model_name,
        **_hires_labels(settings),
        "Eta": f"{settings.eta:g}" if settings.eta != row.eta else None,
        "Clip skip": settings.clip_skip if settings.clip_skip > 1 else None,
        "Emphasis": "None" if settings.plain_prompts else None,
        "Guidance rescale": f"{settings.guidance_rescale:g}" if settings.guidance_rescale else None,
        "Guidance interval": ", ".join(f"{sigma:g}" for sigma in settings.guidance_interval) or None,
        "Reuse features": settings.reuse_features if settings.reuse_features > 1 else None,
        "Token merging ratio": f"{settings.merge_tokens:g}" if settings.merge_tokens else None,
        "Noise Schedule": "Zero Terminal SNR" if settings.zero_terminal_snr else None,
        **(labels or {}),
        "Version": f"sd-zoo {__version__}",
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
    negative = [f"Negative prompt: {settings.negative_prompt}"] if settings.negative_prompt else []
    return "\n".join([settings.prompt, *negative, line])


def _hires_labels(settings: Settings) -> dict[str, object]:
    if settings.hires is None:
        return {"Denoising strength": f"{settings.strength:g}" if settings.strength < 1 else None}
    (width, height), even = settings.hires, settings.hires[0] * settings.height == settings.hires[1] * settings.width
    return {
        "Denoising strength": f"{settings.hires_strength:g}",
        "Hires upscale": f"{width / settings.width:g}" if even else None,
        "Hires resize": None if even else f"{width}x{height}",
        "Hires steps": settings.hires_steps,
        "Hires upscaler": UPSCALES[settings.hires_upscale],
    }


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def split_text(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, and the values in the last line that has values; none if no line has."""
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    values: dict[str, str] = {}
    for i in reversed(range(len(lines))):
        found = values_of(lines[i])
        if "Steps" in found and len(found) >= 3:
            values, lines = found, lines[:i]
            break
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:start]).strip(), negative, values


def values_of(line: str) -> dict[str, str]:
    """`Steps: 20, Model: "a, b", Hashes: {"vae": "1"}` -> the values; quotes and braces enclose JSON."""
    found: dict[str, str] = {}
    name = re.compile(r"\s*([^:,\"{}]{1,60}):\s*")
    i = 0
    while i < len(line):
        match = name.match(line, i)
        if match:
            i = match.end()
            try:
                value, i = json.JSONDecoder().raw_decode(line, i) if line[i : i + 1] in ('"', "{") else (None, i)
            except (ValueError, RecursionError):
                value = None
            comma = line.find(",", i)
            end = len(line) if comma < 0 else comma
            if value is None:
                value = line[i:end].strip()
            found[match[1].strip()] = value if isinstance(value, str) else json.dumps(value)
        comma = line.find(",", i)
        i = len(line) if comma < 0 else comma + 1
    return found


def settings_in(text: str) -> Found:
    """The settings in such a text, by our names; each is valid by itself."""
    prompt, negative, values = split_text(text)
    found = Found({"prompt": prompt, "negative_prompt": negative})
    found.unused += EXTRA_NETWORK.findall(prompt)
    ours = values.get("Version", "").startswith("sd-zoo")
    if ours:  # our labels: in other programs, some of them mean something else
        values |= {name: OUR_NAMES[name].get(values[name], values[name]) for name in OUR_NAMES if name in values}
    for name, value in values.items():
        if name not in NO_SETTINGS and not _read(found.settings, name, value):
            found.unused.append(f"{name}: {value[:60]}")
    if not ours:
        _apply_their_defaults(found, values)
    if "hires" in found.settings and "strength" in found.settings:
        found.settings["hires_strength"] = found.settings.pop("strength")
    _leave_out_invalid(found)
    return found


def _read(settings: dict, name: str, value: str) -> bool:
    """Take one value into the settings, by our name; whether it could be used."""
    if name in VALUES:
        ours, read = VALUES[name]
        try:
            settings[ours] = read(value)
        except ValueError:
            return False
        return True
    if name in CHOICES:
        ours, meanings = CHOICES[name]
        if meanings.get(value) is not None:
            settings[ours] = meanings[value]
        return value in meanings
    return name in READERS and READERS[name](settings, value)


def _sampler(settings: dict, value: str) -> bool:
    found = meaning(value)
    if found is None:
        return False
    settings["sampler"] = found.sampler
    if found.schedule:
        settings.setdefault("schedule", found.schedule)
    if found.discards:
        settings["discard_penultimate"] = True
    return True


def _schedule(settings: dict, value: str) -> bool:
    if value in ("Automatic", "Custom"):  # the sampler's own; the one that the sigmas give
        return True
    name = schedule_name(value)
    if name:
        settings["schedule"] = name
    return name is not None


def _size(settings: dict, value: str) -> bool:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
    if match:
        settings |= {"width": int(match[1]), "height": int(match[2])}
    return match is not None


def _upscaler(settings: dict, value: str) -> bool:
    names = {theirs: ours for ours, theirs in UPSCALES.items()}
    settings["hires_upscale"] = names.get(value, "latent" if value.startswith("Latent") else "image")
    return value in names


READERS = {"Sampler": _sampler, "Schedule type": _schedule, "Size": _size, "Hires upscaler": _upscaler}


def _apply_their_defaults(found: Found, values: dict[str, str]) -> None:
    """Add what other tools mean by leaving a setting out."""
    settings, version = found.settings, values.get("Version", "")
    if "RNG" not in values and WEB_UI.match(version):
        settings["rng"] = "philox"
        found.notes.append(f"noise drawn as on a GPU (--rng philox), as web UI {version[:40]} does by default")
    sampler = settings.get("sampler")
    if sampler and "schedule" not in settings:
        usual = SAMPLER_INFO[sampler].schedule
        if usual == "linspace" or ("Schedule type" not in values and usual in ("karras", "exponential")):
            settings["schedule"] = "normal"  # before schedules had a name of their own, "DPM++ 2M" meant even steps
    elif WEB_UI.match(version) and sampler in ("ddim", "plms", "unipc_bh1"):
        settings.pop("schedule")  # it has an effect on other samplers only
    if "hires" in settings and "steps" in settings and not settings.get("hires_steps"):
        settings["hires_steps"] = settings["steps"]  # the second pass runs as many steps as the first


def _leave_out_invalid(found: Found) -> None:
    """Remove what `Settings` would refuse, and name it."""
    needed = {"width": 512, "height": 512, "seed": 0}
    while True:
        try:
            Settings(**{**needed, **found.settings})
            return
        except SettingError as error:
            if error.name not in found.settings or error.name == "prompt":
                raise
            value = found.settings.pop(error.name)
            found.unused.append(f"{error.name.replace('_', ' ')} {str(value)[:60]}")
