"""Adapters in a picture's settings: whether the model has those that a prompt names, and what is noted of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from sd.pipeline.errors import SettingError
from sd.pipeline.settings import Settings
from sd.text.prompt_adapters import AdapterUse, merged


class Applied(Protocol):
    """An adapter that a model has; `sd.runtime.adapters.AppliedAdapter` is one."""

    name: str
    strength: float
    text_strength: float
    autov3: Callable[[], str]


def with_applied(settings: Settings, adapters: Sequence[Applied]) -> Settings:
    """The settings with all adapters of the model, so that the picture notes those that the prompt does not name.

    Raises SettingError where the prompt names one that the model does not have, or has at another strength: a prompt
    finds no files, and must not say what is not so.
    """
    applied = {use.name: use for use in merged(AdapterUse(a.name, a.strength, a.text_strength) for a in adapters)}
    for use in settings.adapters:
        if use != applied.pop(use.name, None):
            raise SettingError(
                "lora" if settings.lora else "prompt",
                f"names the adapter {use.as_flag}, which is not applied. Apply it first, by its path: "
                f"model.apply([(path, {use.unet:g}, {use.text:g})]).",
            )
    return replace(settings, lora=(*settings.lora, *(use.as_flag for use in applied.values())))


def facts_of(adapters: Sequence[Applied]) -> list[dict[str, object]]:
    """What a picture notes of the adapters; the hash is None for a file that is gone."""
    return [
        {"name": a.name, "autov3": _hash(a), "strength": a.strength, "text_strength": a.text_strength} for a in adapters
    ]


def _hash(adapter: Applied) -> str | None:
    try:
        return adapter.autov3()
    except OSError:
        return None


def hashes_line(facts: Sequence[dict]) -> str | None:
    """ "detail: 0123456789ab, style: ba9876543210", as the web UI notes it; None without any."""
    hashes = {each["name"].translate({ord(","): None, ord(":"): None}): each["autov3"] for each in facts}
    return ", ".join(f"{name}: {digest[:12]}" for name, digest in hashes.items() if digest) or None
