"""Settings in pictures of any program: the web UI's text, a graph of ComfyUI, or JSON with names of its own.

One table has the names of all programs that write JSON; `JSON_PROGRAMS` says how each is recognised.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from sd.pipeline.errors import shortened
from sd.pipeline.image.stored_settings.adapters import take_from_json
from sd.pipeline.image.stored_settings.comfy_graph import Graph
from sd.pipeline.image.stored_settings.comfy_settings import graph_settings
from sd.pipeline.image.stored_settings.settings_line import LONGEST_TEXT
from sd.pipeline.image.stored_settings.web_ui import Found, leave_out_invalid, read_value, set_model, settings_in
from sd.pipeline.image.stored_settings.xl import add_refiner, leave_out_same
from sd.sampling.names import SAMPLER_INFO

NAMES = {  # name in a settings line, "prompt", "negative_prompt", "model" or "refiner" -> what programs call it in JSON
    "prompt": "prompt positive_prompt c",
    "negative_prompt": "negative_prompt negativeprompt uc",
    "Prompt 2": "prompt_2 positive_style_prompt",
    "Negative prompt 2": "negative_prompt_2 negative_style_prompt",
    "Refiner switch at": "refiner_start refiner_switch",
    "Aesthetic score": "refiner_positive_aesthetic_score",
    "Negative aesthetic score": "refiner_negative_aesthetic_score",
    "refiner": "refiner_model",
    "Seed": "seed",
    "Steps": "steps num_inference_steps",
    "CFG scale": "cfg_scale cfgscale guidance_scale scale cfg",
    "Image CFG scale": "image_cfg_scale image_guidance_scale",
    "Size": "size resolution",
    "width": "width",
    "height": "height",
    "Sampler": "sampler sampler_name",
    "Schedule type": "scheduler noise_schedule",
    "Denoising strength": "strength prompt_strength denoising_strength",
    "Clip skip": "clip_skip",
    "Guidance rescale": "cfg_rescale guidance_rescale cfg_rescale_multiplier rescalecfgmultiplier",
    "Tiling": "seamless tiling",
    "RNG": "rand_device",
    "model": "model model_weights model_name base_model use_stable_diffusion_model stable_diffusion_model",
    "hash": "model_hash base_model_hash use_stable_diffusion_model_hash",
}
OURS = {theirs: ours for ours, names in NAMES.items() for theirs in names.split()}
EVEN_ELSEWHERE = ("linspace", "karras", "exponential")  # the schedules of our samplers that have another one there
NO_SETTINGS = {  # what says nothing of the picture, or says again what other names do
    "app_id", "app_version", "version", "app", "type", "generation_mode", "created_by", "metadata_scheme", "timestamp",
    "performance", "full_prompt", "full_negative_prompt", "n_samples", "request_type", "signed_hash", "lora_hashes",
    "swarm_version", "generation_time", "date", "prep_time", "num_outputs", "images", "model_type", "software",
}  # fmt: skip


class Program(NamedTuple):
    """A program that writes JSON: what must be in it, and how it becomes names and values."""

    name: str
    found_in: Callable[[Mapping[str, str], dict[str, dict]], dict | None]


class NoSettings(ValueError):
    """A picture without settings that can be read: a sentence whose subject is the picture."""


def _fooocus(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    for values in data.values():
        if "metadata_scheme" in values or str(values.get("version", "")).startswith("Fooocus"):
            return values
    return None


def _invoke(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    """Three generations: a command line, `sd-metadata`, `invokeai_metadata`. Two write negative prompts in brackets."""
    if "invokeai_metadata" in data:
        values = _with_sampler(data["invokeai_metadata"])
        skip = values.get("clip_skip")
        return {**values, "clip_skip": skip + 1 if type(skip) is int else skip}
    old = data.get("sd-metadata") or data.get("sd_metadata")
    if old and isinstance(old.get("image"), dict):
        values = {**{name: value for name, value in old.items() if name != "image"}, **old["image"]}
        values.pop("model", None)  # the kind of model; its name is `model_weights`
        parts = values.get("prompt")
        if isinstance(parts, list):
            values["prompt"] = ", ".join(str(part.get("prompt")) for part in parts if isinstance(part, dict))
        return _split_brackets(values)
    line = re.match(r'\s*"((?:[^"\\]|\\.)*)"(.{0,2000})', texts.get("Dream", ""), re.DOTALL)
    if not line:
        return None
    flags = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler", "f": "strength"}
    values = {flags.get(flag, f"-{flag}"): value for flag, value in re.findall(r"-(\w+)[ =]*([^\s-]\S*)?", line[2])}
    return _split_brackets({"prompt": line[1], **values})


def _split_brackets(values: dict) -> dict:
    """A prompt with the negative one in square brackets, as two."""
    prompt = str(values.get("prompt", ""))
    negative = ", ".join(part.strip(" ,") for part in re.findall(r"\[([^\[\]]*)\]", prompt))
    return {**values, "prompt": re.sub(r"\[[^\[\]]*\]", "", prompt).strip(" ,"), "negative_prompt": negative}


def _with_sampler(values: dict) -> dict:
    """Some call the sampler a scheduler."""
    if "sampler" in values or "sampler_name" in values or "scheduler" not in values:
        return values
    return {**{name: value for name, value in values.items() if name != "scheduler"}, "sampler": values["scheduler"]}


def _novel(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    around = next((values for values in data.values() if "Comment" in values), {})  # all of it as one JSON text
    source = {**texts, **{name: value for name, value in around.items() if isinstance(value, str)}}
    values = data.get("Comment") or _json(source.get("Comment", ""))
    if not values or "NovelAI" not in (source.get("Software"), str(source.get("Title"))[:7]):
        return None
    model = re.fullmatch(r"(.{1,100}?)\s+([0-9A-Fa-f]{8,64})", source.get("Source", "")[:200])
    named = {"model": model[1], "model_hash": model[2]} if model else {}
    values = {name: value for name, value in values.items() if name not in ("v4_prompt", "v4_negative_prompt")}
    if values.get("noise_schedule") == "native":
        del values["noise_schedule"]
    return {"prompt": source.get("Description", ""), **named, **values}


def _easy(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    for values in (texts, *data.values()):
        names = {_plain(name): value for name, value in values.items()}
        if "use_stable_diffusion_model" in names or "stable_diffusion_model" in names:
            return {name: value for name, value in names.items() if name != "pixels" and value not in ("None", "False")}
    return None


def _swarm(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    return next((v["sui_image_params"] for v in data.values() if isinstance(v.get("sui_image_params"), dict)), None)


def _draw_things(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    return next((values for values in data.values() if "c" in values and "sampler" in values), None)


def _any(texts: Mapping[str, str], data: dict[str, dict]) -> dict | None:
    """JSON with a prompt and a few settings, by anyone's names."""
    for values in data.values():
        known = {OURS.get(_plain(name)) for name, value in values.items() if not isinstance(value, dict)}
        if {"prompt", "Steps"} <= known or {"prompt", "Seed"} <= known:
            return _with_sampler({_plain(name): value for name, value in values.items()})
    return None


JSON_PROGRAMS = [
    Program("Fooocus", _fooocus),
    Program("InvokeAI", _invoke),
    Program("NovelAI", _novel),
    Program("SwarmUI", _swarm),
    Program("Easy Diffusion", _easy),
    Program("Draw Things", _draw_things),
    Program("", _any),
]


def settings_of_texts(texts: Mapping[str, str]) -> Found:
    """The settings in the texts of a picture, as `read_foreign_texts` returns them.

    Raises NoSettings, which names the program where something does.
    """
    for name, text in texts.items():
        if len(text) > LONGEST_TEXT:
            raise NoSettings(
                f"has a text {name[:40]!r} of {len(text):,} characters; at most {LONGEST_TEXT:,} are read."
            )
    for text in texts.values():
        if "Steps:" in text and (found := settings_in(text)):
            return found
    data = {name: values for name, text in texts.items() if name != "sd" and (values := _json(text))}
    for program in JSON_PROGRAMS:
        values = program.found_in(texts, data)
        if values:
            return _named_settings(program.name, values, texts["pixels"])
    graph = Graph.read(data.get("prompt"), data.get("workflow"))
    if graph:
        found = graph_settings(graph, texts["pixels"])
        if found is None:
            kinds = sorted({kind for kind, _ in graph.nodes.values() if "ampl" in kind})
            seen = f" (it has {shortened(', '.join(kinds))})" if kinds else ""
            raise NoSettings(f"was made by ComfyUI, but its graph has no sampler that is read here{seen}.")
        leave_out_invalid(found)
        return found
    raise NoSettings(_why_not(texts))


def _why_not(texts: Mapping[str, str]) -> str:
    """What is said of a picture whose texts, if any, hold no settings."""
    written = {name: text.strip() for name, text in texts.items() if name != "pixels" and text.strip()}
    maker = written.get("Software") or written.get("Source") or written.get("Make")
    by = f" It was made by {maker[:60]}." if maker else ""
    for name in ("parameters", "UserComment", "comment", "Comment", "Description", "ImageDescription", "prompt"):
        if name in written:
            lacks = "is JSON of no program that is known here"
            if not written[name].startswith("{"):
                lacks = 'has no line such as "Steps: 20, Sampler: Euler, ...", and is not taken as a prompt'
            return f"has no settings that can be read: its text {shortened(written[name])} {lacks}.{by}"
    return f"has no settings that can be read. Pictures lose them when they are edited or sent.{by}"


def _json(text: str) -> dict:
    """The object in a JSON text; empty if it is none."""
    if not text.lstrip().startswith("{"):
        return {}
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {}


def _plain(name: object) -> str:
    return re.sub(r"[ -]", "_", str(name)).lower()


def _named_settings(program: str, values: dict, pixels: str) -> Found:
    """Settings by the names of a program that writes JSON. What is false, 0 or empty changes nothing."""
    found = Found({"prompt": "", "negative_prompt": ""}, program=program)
    model: dict[str, object] = {}
    refiner: object = None
    for theirs, value in _flat(take_from_json(found, values)):
        name = OURS.get(_plain(theirs))
        if name in ("prompt", "negative_prompt") and isinstance(value, str):
            found.settings[name] = found.settings[name] or value.strip()
        elif name in ("width", "height"):
            found.settings[name] = (
                int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value
            )
        elif name == "Size" and isinstance(value, str):
            read_value(found, name, "x".join(re.findall(r"\d+", value)))
        elif name in ("model", "hash"):
            model.setdefault(name, value)
        elif name == "refiner":
            refiner = value
        elif name and value not in (None, "", False):
            read_value(found, name, value)
        elif value and _plain(theirs) not in NO_SETTINGS and value != "None":
            found.unused.append(f"{str(theirs)[:40]}: {shortened(value)}")
    set_model(found, model.get("model"), model.get("hash"))
    add_refiner(found, refiner)
    leave_out_same(found)
    if "width" not in found.settings and re.fullmatch(r"\d+[02468]x\d+[02468]", pixels):
        read_value(found, "Size", pixels)  # nothing else says it
    if found.settings.get("strength") in (0, 1):
        del found.settings["strength"]
    _add_schedule(found)
    leave_out_invalid(found)
    return found


def _add_schedule(found: Found) -> None:
    """Add the schedule that a program means by naming none: as diffusers spaces timesteps, or k-diffusion."""
    settings, sampler = found.settings, found.settings.get("sampler")
    if found.program == "InvokeAI":
        settings.pop("discard_penultimate", None)  # it never does, whatever the name of the sampler
    if sampler is None or "schedule" in settings or SAMPLER_INFO[sampler].schedule not in EVEN_ELSEWHERE:
        return
    if found.program == "InvokeAI":
        settings["schedule"] = "sgm_uniform" if sampler.startswith("dpmpp_2m") else "linspace"
    elif found.program == "NovelAI":
        settings["schedule"] = "normal"


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The values, with the name of a model that is an object in place of it."""
    for name, value in values.items():
        if _plain(name) == "refiner_model" and isinstance(value, dict):
            yield name, value.get("model_name") or value.get("name")
        elif _plain(name) == "model" and isinstance(value, dict):
            yield "model", value.get("model_name") or value.get("name")
            digest = str(value.get("hash") or "")
            yield "model_hash", digest.removeprefix("sha256:") if ":" in digest and digest[:7] == "sha256:" else None
        else:
            yield name, value
