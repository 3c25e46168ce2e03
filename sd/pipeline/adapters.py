"""The adapters that settings name, whether the model has them, and what a picture notes of them and of its words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from sd.pipeline.errors import SettingError
from sd.text.prompt_adapters import MOST, AdapterUse, from_flag, in_prompt, merged, name_beside
from sd.text.prompt_syntax import PromptError

if TYPE_CHECKING:
    from sd.pipeline.settings import Settings
    from sd.pipeline.stable_diffusion import StableDiffusion


class Applied(Protocol):
    """An adapter that a model has; `sd.runtime.adapters.AppliedAdapter` is one."""

    name: str
    strength: float
    text_strength: float
    autov3: Callable[[], str]


def checked_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """The adapters of flags as we write them, each once. Raises SettingError."""
    if len(flags) > MOST:
        raise SettingError("lora", f"names {len(flags)} adapters; at most {MOST} are read.")
    try:
        return tuple(use.as_flag for use in merged(map(from_flag, flags)))
    except ValueError as error:
        raise SettingError("lora", str(error)) from None


def named_in(settings: "Settings") -> tuple[AdapterUse, ...]:
    """The adapters of prompt and flags, each once. Raises SettingError."""
    try:
        in_text = [] if settings.plain_prompts else in_prompt(settings.prompt)
    except PromptError as error:
        raise SettingError("prompt", str(error)) from None
    return merged([*in_text, *map(from_flag, settings.lora)])


def with_applied(settings: "Settings", adapters: Sequence[Applied]) -> "Settings":
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


def noted(model: "StableDiffusion", settings: "Settings") -> tuple[dict[str, str | None], dict[str, list[dict]]]:
    """What a picture notes of the adapters and learned words in use: hashes as the web UI has them, and exact facts."""
    from sd.text.learned_words import words_used

    words = words_used(settings.all_texts(), model.tokenizer, plain=settings.plain_prompts) if model.words else ()
    facts = {
        "embeddings": [{"name": word.name, "sha256": word.sha256} for word in words if not word.bundled],
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
