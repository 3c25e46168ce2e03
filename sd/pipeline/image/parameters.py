"""The text that image generators write into pictures, from our settings.

    a photograph of a horse
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.7

`sd.pipeline.image.stored_settings` reads it, and what other programs write.
"""

import json

from sd import __version__
from sd.pipeline.second_pass import UPSCALES
from sd.pipeline.settings import Settings
from sd.sampling.names import SAMPLER_INFO, SCHEDULES


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
        "Sigmas": ", ".join(_shortest(sigma) for sigma in settings.sigmas) or None,
        "CFG scale": _shortest(settings.guidance_scale),
        "Image CFG scale": None if settings.image_guidance is None else _shortest(settings.image_guidance),
        "Seed": settings.seed,
        "Prompt 2": settings.prompt_2 or None,
        "Negative prompt 2": settings.negative_prompt_2 or None,
        "Original size": "x".join(map(str, settings.original_size)) or None,
        "Crop": ", ".join(map(str, settings.crop)) or None,
        "Aesthetic score": _unless(6, settings.aesthetic_score),
        "Negative aesthetic score": _unless(2.5, settings.negative_aesthetic_score),
        "Refiner switch at": _unless(None, settings.switch_at),
        "Refiner switch by": settings.switch_by if settings.switch_at is not None else None,
        "Size": f"{settings.width}x{settings.height}",
        "Tiling": {"": None, "xy": True}.get(settings.tile, settings.tile),
        "Variation seed": settings.vary_seed,
        "Variation seed strength": _shortest(settings.vary) if settings.vary else None,
        "ENSD": settings.seed_delta or None,
        "RNG": "NV" if settings.rng == "philox" else None,
        "Model hash": model_hash,
        "Model": model_name,
        **_hires_labels(settings),
        "Eta": _shortest(settings.eta) if settings.eta != row.eta else None,
        "Clip skip": settings.clip_skip if settings.clip_skip > 1 else None,
        "Emphasis": "None" if settings.plain_prompts else None,
        "Guidance rescale": _shortest(settings.guidance_rescale) if settings.guidance_rescale else None,
        "Guidance interval": ", ".join(_shortest(sigma) for sigma in settings.guidance_interval) or None,
        "Reuse features": settings.reuse_features if settings.reuse_features > 1 else None,
        "Token merging ratio": _shortest(settings.merge_tokens) if settings.merge_tokens else None,
        "Noise Schedule": "Zero Terminal SNR" if settings.zero_terminal_snr else None,
        **(labels or {}),
        "Version": f"sd-zoo {__version__}",
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
    negative = [f"Negative prompt: {settings.negative_prompt}"] if settings.negative_prompt else []
    return "\n".join([_prompt_of(settings), *negative, line])


def _prompt_of(settings: Settings) -> str:
    """The prompt, with the adapters of flags in it, where other tools look for them."""
    if not settings.lora:
        return settings.prompt
    from sd.text.prompt_adapters import from_flag

    return " ".join(filter(None, [settings.prompt, *(from_flag(flag).in_brackets for flag in settings.lora)]))


def _hires_labels(settings: Settings) -> dict[str, object]:
    if settings.hires is None:
        return {"Denoising strength": _shortest(settings.strength) if settings.strength < 1 else None}
    (width, height), even = settings.hires, settings.hires[0] * settings.height == settings.hires[1] * settings.width
    return {
        "Denoising strength": _shortest(settings.hires_strength),
        "Hires upscale": f"{width / settings.width:g}" if even else None,
        "Hires resize": None if even else f"{width}x{height}",
        "Hires steps": settings.hires_steps,
        "Hires upscaler": UPSCALES[settings.hires_upscale],
    }


def _unless(usual: float | None, number: float | None) -> str | None:
    """The number as a text, None for the usual one."""
    return None if number == usual else _shortest(number)


def _shortest(number: float) -> str:
    """With as few digits as say exactly this number."""
    return next(text for text in (f"{number:g}", repr(number)) if float(text) == number)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
