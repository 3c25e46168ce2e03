"""The adapters that other programs note in pictures, as settings of ours and as names with hashes.

What is noted is in `made_with["adapters"]`: a list of {"name": ..., "autov3": first digits of a hash, or None}.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sd.text.prompt_adapters import MOST, NUMBER, AdapterUse, from_flag, in_prompt, name_beside
from sd.text.prompt_syntax import PromptError, without_adapters

if TYPE_CHECKING:
    from sd.pipeline.image.stored_settings.web_ui import Found

ENDING = re.compile(r"\.(safetensors|ckpt|pt|pth|bin)$", re.IGNORECASE)
MODULE = re.compile(r"(.{1,200}?)\(([0-9a-f]{8,64})\)")  # "detail(0123456789ab)"
COMBINED = re.compile(r"lora_combined_[0-9]{1,2}")
IN_LINE = re.compile(r"lora hashes|lora weights|addnet .*", re.IGNORECASE)  # names in a line of settings
NAMES = ("loras", "lora", "use_lora_model")  # in JSON
WEIGHTS = ("loraweights", "lora_weights", "lora_alpha")  # in JSON: one number, or one for each


def use_of(name: object, unet: object, text: object = None) -> AdapterUse | None:
    """An adapter that a program names by its file. None if it cannot be, or has strengths that are no numbers."""
    if not isinstance(name, str) or not name.strip() or name == "None":
        return None
    numbers = [str(value).strip() for value in (unet, unet if text is None else text)]
    if isinstance(unet, bool) or not all(map(NUMBER.fullmatch, numbers)):
        return None
    use = AdapterUse(ENDING.sub("", name.strip().replace("\\", "/")), *map(float, numbers))
    try:
        return from_flag(use.as_flag)
    except ValueError:
        return None


def add(found: "Found", use: AdapterUse | None, given: object, digest: object = None) -> None:
    """Take an adapter, whatever the prompt has; `given` is shown if it cannot be used."""
    if use is None:
        found.unused.append(f"LoRA {str(given)[:60]}")
        return
    found.settings.setdefault("lora", []).append(use.as_flag)
    note(found, use.name, digest)


def note(found: "Found", name: str, digest: object) -> None:
    """Keep the hash of an adapter, to find it again."""
    known = digest.lower() if isinstance(digest, str) and re.fullmatch("[0-9A-Fa-f]{8,64}", digest) else None
    noted = found.made_with.setdefault("adapters", [])
    if len(noted) < MOST:
        noted.append({"name": name, "autov3": known})


def add_from_line(found: "Found", values: Mapping[str, str]) -> None:
    """From a line of settings: the hashes of adapters in the prompt, and adapters that only the line has."""
    lines = {name.lower(): value for name, value in values.items()}
    hashes = dict(_pairs(lines.get("lora hashes", "")))
    for name, weight in _pairs(lines.get("lora weights", "")):  # of Fooocus, in whose prompts they are not
        add(found, use_of(name, weight), name, hashes.pop(name, None))
    for number in range(1, 6) if lines.get("addnet enabled") == "True" else ():  # before prompts named them
        model = lines.get(f"addnet model {number}", "None")
        if model != "None":
            name, digest = parts.groups() if (parts := MODULE.fullmatch(model)) else (model, None)
            unet, text = (lines.get(f"addnet weight {letter} {number}", "1") for letter in "ab")
            add(found, use_of(name, unet, text), model, digest)
    named = _named_in(found.settings.get("prompt", ""))
    for name, digest in hashes.items():
        if name not in named:
            found.unused.append(f"LoRA {name[:60]} ({digest[:12]}), whose strength is not noted")
    for name, digest in {**_in_hashes(lines.get("hashes", "")), **hashes}.items():
        note(found, name, digest)


def _named_in(prompt: str) -> set[str]:
    """The adapters that a prompt names, as they are called beside it."""
    try:
        return {name_beside(use.name) for use in in_prompt(prompt)}
    except PromptError:  # which is said where the prompt is used
        return set()


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """ "a: 1, b: 2" """
    for part in text.split(",")[:MOST]:
        name, colon, value = part.rpartition(":")
        if colon and name.strip():
            yield name.strip(), value.strip()


def _in_hashes(text: str) -> dict[str, object]:
    """Those in {"model": "...", "lora:detail": "..."}, which an extension of the web UI writes."""
    try:
        hashes = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    known = hashes.items() if isinstance(hashes, dict) else ()
    return {name.removeprefix("lora:"): digest for name, digest in known if name.startswith("lora:")}


def take_from_json(found: "Found", values: Mapping[str, object]) -> dict[str, object]:
    """Take the adapters out of what a program writes as JSON; returns the rest.

    Fooocus      [["detail.safetensors", 0.8]] and "lora_combined_1": "detail : 0.8"
    InvokeAI     [{"model": {"name": "detail"}, "weight": 0.8}]
    Draw Things  [{"file": "detail.ckpt", "weight": 0.8}]
    SwarmUI and Easy Diffusion have lists of names and of weights
    """
    plain = {re.sub(r"[ -]", "_", str(name)).lower(): value for name, value in values.items()}
    weights = next((plain[name] for name in WEIGHTS if name in plain), None)
    weights = weights.split(",") if isinstance(weights, str) else weights if isinstance(weights, list) else [weights]
    for name, given in plain.items():
        if COMBINED.fullmatch(name) and isinstance(given, str):
            title, _, weight = given.rpartition(" : ")
            add(found, use_of(title, weight), given)
        if name not in NAMES:
            continue
        listed = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
        for i, each in enumerate(listed[:MOST]):
            title, weight, digest = _parts(each)
            if title in ("", "None") or each is None:
                continue
            beside = weights[i] if i < len(weights) else None
            weight = next(value for value in (weight, beside, 1) if value is not None)
            add(found, use_of(title, weight), title if isinstance(title, str) else each, digest)
    taken = {name for name in plain if COMBINED.fullmatch(name) or name in (*NAMES, *WEIGHTS)}
    return {name: value for name, value in values.items() if re.sub(r"[ -]", "_", str(name)).lower() not in taken}


def _parts(given: object) -> tuple[object, object, object]:
    """Name, weight and hash of one adapter."""
    if isinstance(given, list):
        return (*given[:3], None, None, None)[:3]
    if not isinstance(given, dict):
        return given, None, None
    weight = next((given[name] for name in ("weight", "strength") if name in given), None)
    for name in ("model", "lora"):
        if isinstance(given.get(name), dict):
            given = {**given, **given[name]}
    name = next((given[name] for name in ("name", "model_name", "file", "model", "lora") if name in given), None)
    return name, weight, given.get("hash")


def move_from_prompt(found: "Found") -> None:
    """For a prompt whose brackets are text: programs that write such pictures read adapters in it all the same."""
    prompt = found.settings.get("prompt", "")
    try:
        uses = in_prompt(prompt)
    except PromptError:
        return
    if uses:
        found.settings["prompt"] = without_adapters(prompt)
        found.settings["lora"] = [*found.settings.get("lora", []), *(use.as_flag for use in uses)]
