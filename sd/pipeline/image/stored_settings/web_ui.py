"""From a line of settings, as the common web UI, we and others write it, to settings by our names."""

import json
import math
import re
from dataclasses import dataclass, field

from sd.pipeline.errors import SettingError, shortened
from sd.pipeline.image.stored_settings.adapters import IN_LINE, add_from_line, move_from_prompt
from sd.pipeline.image.stored_settings.settings_line import MOST_SHOWN, parts_of
from sd.pipeline.second_pass import UPSCALES
from sd.pipeline.settings import FIELDS, RNGS, Settings
from sd.sampling.names import SAMPLER_INFO, SCHEDULES, meaning, schedule_name


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _whole(text: str) -> int:
    """ "20" and "20.0" as a number; for seeds, which have more digits than a float."""
    return int(text.strip().removesuffix(".0"))


OURS = "sd-zoo"
VALUES = {  # as other tools write it -> our name, and its type
    "Steps": ("steps", _whole),
    "CFG scale": ("guidance_scale", float),
    "Image CFG scale": ("image_guidance", float),
    "Seed": ("seed", _whole),
    "Sigmas": ("sigmas", _floats),
    "Clip skip": ("clip_skip", _whole),
    "Eta": ("eta", float),
    "Eta DDIM": ("eta", float),
    "Guidance rescale": ("guidance_rescale", float),
    "Guidance interval": ("guidance_interval", _floats),
    "Reuse features": ("reuse_features", _whole),
    "Token merging ratio": ("merge_tokens", float),
    "Variation seed": ("vary_seed", _whole),
    "Variation seed strength": ("vary", float),
    "Denoising strength": ("strength", float),
    "Hires upscale": ("hires", str),
    "Hires resize": ("hires", str),
    "Hires steps": ("hires_steps", _whole),
    "ENSD": ("seed_delta", _whole),
    "Prompt 2": ("prompt_2", str),
    "Negative prompt 2": ("negative_prompt_2", str),
    "Original size": ("original_size", str),
    "Crop": ("crop", str),
    "Aesthetic score": ("aesthetic_score", float),
    "Negative aesthetic score": ("negative_aesthetic_score", float),
    "Refiner switch at": ("switch_at", float),
    "Refiner switch by": ("switch_by", str),
    "Guidance Scale": ("guidance_scale", float),
    "Strength": ("strength", float),
}
CHOICES = {  # as other tools write it -> our name, and our value for each of theirs; None is the default
    "Tiling": ("tile", {"True": "xy", "False": None, "x": "x", "y": "y"}),
    "Emphasis": ("plain_prompts", {"None": True, "Original": None}),
    "Noise Schedule": ("zero_terminal_snr", {"Zero Terminal SNR": True, "Default": None}),
    "Discard penultimate sigma": ("discard_penultimate", {"True": True, "False": None}),
    "RNG": ("rng", RNGS | {name.upper(): ours for name, ours in RNGS.items()}),
}
OUR_NAMES = {  # by the labels that we write
    "Sampler": {row.label: name for name, row in SAMPLER_INFO.items()},
    "Schedule type": {label: name for name, (label, _) in SCHEDULES.items()},
}
# Not settings: these do not change the picture.
NO_SETTINGS = ("Version", "App", "Model", "Model hash", "Batch size", "Batch pos", "VAE hash", "TI hashes")
PROGRAMS = {  # name -> how what it writes as its version begins
    OURS: "sd-zoo",
    "Fooocus": "Fooocus",
    "ComfyUI": "ComfyUI",
    "SD.Next": "SD.Next|SDNext",
    "stable-diffusion.cpp": r"stable-diffusion\.cpp",
    "Forge": r"f[0-9]+\.[0-9]",
    "AUTOMATIC1111's web UI": r"v?[0-9]+\.[0-9]",
}
WEB_UI = ("AUTOMATIC1111's web UI", "Forge")


@dataclass
class Found:
    """Settings by our names, and each part of a text that could not be used, in a few words.

    notes      what is worth knowing: what was chosen where the text says nothing
    program    that made the picture; empty if nothing says it
    made_with  what is stored of its model and device, by the names of OF_THE_RUN: "model" with "name", and "sha256",
               whole or its first digits, or "hash", the 8 digits that older tools showed; "embeddings" and "adapters"
               likewise, the latter with "autov3"
    """

    settings: dict = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    program: str = ""
    made_with: dict = field(default_factory=dict)


def settings_in(text: str) -> Found | None:
    """The settings in such a text, by our names; each is valid by itself. None if no line of it is one of settings."""
    prompt, negative, values, unused = parts_of(text)
    if not values:
        return None
    found = Found({"prompt": prompt, "negative_prompt": negative}, program=program_of(values))
    if found.program == OURS:  # our labels: in other programs, some of them mean something else
        values |= {name: OUR_NAMES[name].get(values[name], values[name]) for name in OUR_NAMES if name in values}
    refiner = values.pop("Refiner") if "Refiner" in values and "Refiner switch at" in values else ""
    for name, value in values.items():
        if name not in NO_SETTINGS and not IN_LINE.fullmatch(name) and not _read(found.settings, name, value):
            found.unused.append(f"{name}: {value[:MOST_SHOWN]}")
    if found.program != OURS:
        _apply_their_defaults(found, values)
    if "hires" in found.settings and "strength" in found.settings:
        found.settings["hires_strength"] = found.settings.pop("strength")
    add_from_line(found, values)
    if found.program != OURS and found.settings.get("plain_prompts"):
        move_from_prompt(found)
    hashes = _hashes_in(values.get("Hashes", ""))
    set_model(found, values.get("Model"), values.get("Model hash") or hashes.get("model"))
    if refiner:
        name, _, sha256 = refiner.removesuffix("]").partition(" [")
        found.made_with["refiner"] = {"name": name, "sha256": sha256.lower()}
    set_embeddings(found, values.get("TI hashes", ""), hashes)
    leave_out_invalid(found)
    found.unused += unused
    return found


def program_of(values: dict[str, str]) -> str:
    """Which program wrote a line of settings, from its own name for its version."""
    version = f"{values.get('App', '')} {values.get('Version', '')}".strip()
    return next((name for name, pattern in PROGRAMS.items() if re.match(pattern, version)), "")


def set_model(found: Found, name: object, sha256: object) -> None:
    """Note the model's name and its hash: a sha256 or its first digits; older, shorter ones are "hash"."""
    model = {}
    if isinstance(name, str) and name:
        model["name"] = name
    if isinstance(sha256, str) and re.fullmatch(r"[0-9A-Fa-f]{10,64}", sha256):
        model["sha256"] = sha256.lower()
    elif isinstance(sha256, str) and sha256:
        model["hash"] = sha256[:80]
    if model:
        found.made_with["model"] = model


def set_embeddings(found: Found, listed: str, hashes: dict) -> None:
    """Note the embeddings.

    listed  "easynegative: c74b4e810b03, other: 1a2b3c4d5e6f"
    hashes  {"embed:easynegative": "c74b4e810b", ...}, where nothing is listed
    """
    of_all = [(name.removeprefix("embed:"), value) for name, value in hashes.items() if name.startswith("embed:")]
    pairs = [entry.rpartition(":")[::2] for entry in listed.split(",")] if listed else of_all
    noted = [{"name": name.strip(), "sha256": str(value).strip().lower()} for name, value in pairs if name.strip()]
    if noted:
        found.made_with["embeddings"] = noted


def _hashes_in(text: str) -> dict:
    """The JSON in which some programs list the hashes of all files; {} if it is none."""
    try:
        hashes = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def read_value(found: Found, name: str, value: object) -> None:
    """Take one value, which has such a name in a settings line, into what was found; None is none."""
    if value is not None and not _read(found.settings, name, str(value)):
        found.unused.append(f"{name}: {shortened(value)}")


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
    settings = found.settings
    if "switch_at" in settings:
        settings["switch_by"] = "steps"
    if "RNG" not in values and found.program in WEB_UI:
        settings["rng"] = "philox"
        version = values.get("Version", "")[:40]
        found.notes.append(f"noise drawn as on a GPU (--rng philox), as web UI {version} does by default")
    if found.program == "stable-diffusion.cpp" and settings.get("eta") in (0, math.inf):
        del settings["eta"]  # written where none is asked for
    sampler = settings.get("sampler")
    if sampler and "schedule" not in settings:
        usual = SAMPLER_INFO[sampler].schedule
        if usual == "linspace" or ("Schedule type" not in values and usual in ("karras", "exponential")):
            settings["schedule"] = "normal"  # before schedules had a name of their own, "DPM++ 2M" meant even steps
    elif found.program in WEB_UI and sampler in ("ddim", "plms", "unipc_bh1"):
        settings.pop("schedule")  # it has an effect on other samplers only
    if "hires" in settings and "steps" in settings and not settings.get("hires_steps"):
        settings["hires_steps"] = settings["steps"]  # the second pass runs as many steps as the first


def leave_out_invalid(found: Found) -> None:
    """Remove what `Settings` would refuse, and name it. The prompt stays as it is: it is refused where it is used."""
    needed = {"prompt": "", "width": 512, "height": 512, "seed": 0}
    while True:
        ours = {name: value for name, value in found.settings.items() if name in FIELDS}
        try:
            Settings(**{**needed, **ours, "prompt": ""})
            return
        except SettingError as error:
            if error.name not in found.settings:
                raise
            if error.name == "hires":
                for name in ("hires_upscale", "hires_strength", "hires_steps"):
                    found.settings.pop(name, None)
            names = ("width", "height") if error.name in ("width", "height") else (error.name,)
            values = [shortened(found.settings.pop(name)) for name in names if name in found.settings]
            name = "size" if len(values) > 1 else error.name.replace("_", " ")
            found.unused.append(f"{name} {'x'.join(values)}")
