"""Adapters and learned words of a picture: whether the model has the adapters of the prompt, and what is noted."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from sd.pipeline.errors import SettingError
from sd.pipeline.settings import Settings
from sd.text.prompt_adapters import AdapterUse, merged, name_beside

if TYPE_CHECKING:
    from sd.pipeline.stable_diffusion import StableDiffusion


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


def noted(model: "StableDiffusion", settings: Settings) -> tuple[dict[str, str | None], dict[str, list[dict]]]:
    """What a picture notes of the adapters and learned words in use: hashes as the web UI has them, and exact facts."""
    from sd.pipeline.learning import words_of

    words = [word for word in words_of(model, settings) if not word.bundled] if model.words else []
    facts = {
        "embeddings": [{"name": word.name, "sha256": word.sha256} for word in words],
        "adapters": [
            {"name": a.name, "autov3": _hash(a), "strength": a.strength, "text_strength": a.text_strength}
            for a in model.adapters
        ],
    }
    labels = {
        "Lora hashes": _line((each["name"], each["autov3"]) for each in facts["adapters"]),
        "TI hashes": _line((each["name"], each["sha256"]) for each in facts["embeddings"]),
    }
    return labels, {name: files for name, files in facts.items() if files}


def _hash(adapter: Applied) -> str | None:
    """None for a file that is gone."""
    try:
        return adapter.autov3()
    except OSError:
        return None


def _line(hashes: Iterable[tuple[str, str | None]]) -> str | None:
    """ "detail: 0123456789ab, style: ba9876543210"; None without any."""
    known = {name_beside(name): digest for name, digest in hashes}
    return ", ".join(f"{name}: {digest[:12]}" for name, digest in known.items() if digest) or None
