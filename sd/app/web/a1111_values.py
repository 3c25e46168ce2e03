"""Reading the values of a request whose clients are not strict: 20.0 and "20" for 20, None for what is not given."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from sd.app.errors import UsageError
from sd.pipeline.errors import shortened
from sd.pipeline.settings import is_of_type, type_name

OFF = (None, "", 0, -1, False, [], {})  # values that ask for nothing
NOTHING = ("", "none", "automatic", "default", "n/a")  # what clients send where nothing is chosen


def like_type(name: str, value: object, kind: Any) -> Any:
    """The value as one of this type, if it means one. Raises UsageError."""
    meant = value
    if kind is bool and value in (0, 1):
        meant = bool(value)
    elif isinstance(value, str) and not is_of_type("", kind) and len(value) < 40:
        with suppress(ValueError):
            meant = float(value)
    if isinstance(meant, float) and meant.is_integer() and not is_of_type(meant, kind):
        meant = int(meant)
    if not is_of_type(meant, kind):
        raise UsageError(f"{name} cannot be {shortened(value)}; it is of type {type_name(kind)}.")
    return meant


def number(body: Mapping[str, object], name: str, usual: Any, kind: type = int) -> Any:
    """A number of a request, else the usual one."""
    value = body.get(name)
    return usual if value is None else like_type(name, value, kind)


def dictionary(body: Mapping[str, object], name: str) -> dict[str, object]:
    """An object of a request; empty if there is none."""
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be an object in braces, got {shortened(value)}.")
    return value


def chosen(body: Mapping[str, object], name: str) -> str:
    """The name that is chosen from a list of ours; "" where a client says that it has chosen none."""
    value = like_type(name, body.get(name) or "", str)
    return "" if value.strip().lower() in NOTHING else value


def choice(body: Mapping[str, object], name: str, names: Collection[str], usual: str) -> str:
    """One of several names that a request gives by its number."""
    index = number(body, name, list(names).index(usual))
    if not 0 <= index < len(names):
        listed = ", ".join(f"{i} ({each})" for i, each in enumerate(names))
        raise UsageError(f"{name} {index} does not exist. There are: {listed}.")
    return list(names)[index]


def refuse(name: str, value: object, nothing: Collection[object], why: str) -> None:
    """Raise UsageError for a field that asks for what cannot be done here."""
    if value not in nothing:
        raise UsageError(f"{name} {shortened(value)} cannot be used: {why}.")


def is_off(script: object) -> bool:
    """Whether a script of the web UI does nothing: it has no arguments, or says that it is switched off."""
    args = script.get("args") if isinstance(script, dict) else script
    args = list(args.values()) if isinstance(args, dict) else args
    if not args:
        return True
    return isinstance(args, list) and (args[0] is False or all(map(_says_off, args)))


def _says_off(unit: object) -> bool:
    return not unit or (isinstance(unit, dict) and unit.get("enabled", unit.get("enable")) is False)


def lora_flags(given: object) -> list[str]:
    """A list such as [{"path": "style", "multiplier": 0.8}], stable-diffusion.cpp's form, as ours: ["style:0.8"]."""
    if not isinstance(given, list):
        raise UsageError(f"lora must be a list, got {shortened(given)}.")
    flags = []
    for use in given:
        if not isinstance(use, dict) or not isinstance(name := use.get("path") or use.get("name"), str):
            raise UsageError(f'lora must be a list of objects such as {{"path": "style"}}, got {shortened(use)}.')
        if use.get("is_high_noise"):
            raise UsageError("lora: is_high_noise is for models of two stages, which are not supported here.")
        flags.append(f"{name}:{number(use, 'multiplier', 1.0, float):g}")
    return flags
