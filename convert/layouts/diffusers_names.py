"""Diffusers' names in all their spellings, and the original name that each stands for."""

from collections.abc import Iterable
from dataclasses import replace

from convert.errors import WeightMismatchError
from convert.files.limits import LIMITS
from convert.layouts.names import DEPTH_ESTIMATOR, TEXT_PREFIX, diffusers_names, original_names
from convert.layouts.wrapping import BARE_DIFFUSERS
from sd.config import OPEN_CLIP_BIG_G, SDXL

COMPONENTS = ("unet", "vae", "text_encoder")
OTHER_PREFIXES = {  # of whole models in one file, as some write it
    "te.": "text_encoder.",
    "text_encoder.transformer.": "text_encoder.",
}


def current_name(name: str) -> str:
    """A name as diffusers writes it today, with its component in front, from one that other versions wrote."""
    for component, starts in BARE_DIFFUSERS.items():
        if name.startswith(starts):
            name = f"{component}.{name}"
    for other, prefix in OTHER_PREFIXES.items():
        if name.startswith(other):
            name = prefix + name.removeprefix(other)
    for start in ("text_encoder.", "text_encoder_2."):
        if name.startswith(start) and not name.startswith((start + TEXT_PREFIX, start + "text_projection.")):
            return name.replace(start, start + TEXT_PREFIX, 1)
    return name


def with_first_text_encoder(names: dict[str, str]) -> dict[str, str]:
    """The same, whose only text encoder is the first one: in a folder of XL's refiner, it is the second."""
    if any(name.startswith("text_encoder.") for name in names.values()):
        return names
    second = "text_encoder_2."
    return {
        stored: "text_encoder." + name.removeprefix(second) if name.startswith(second) else name
        for stored, name in names.items()
    }


def original_by_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Which original name stands for which of diffusers', for every weight that a model with such names may have.

    names  those in the file: how many levels, residuals and layers they count is how many the model has

    Raises WeightMismatchError for more of them than any model has.
    """
    names = list(names)

    def count(prefix: str) -> int:
        found = len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
        if found > LIMITS.text_layers:
            raise WeightMismatchError(f"has {found} parts named {prefix}0 and so on; no model has as many.")
        return found

    levels, vae_levels = (
        max(1, min(count(prefix), LIMITS.levels)) for prefix in ("unet.down_blocks.", "vae.encoder.down_blocks.")
    )
    # Growing at every level, it has a shortcut wherever some width has one.
    widest = replace(
        SDXL,
        unet=replace(
            SDXL.unet,
            multipliers=tuple(2**level for level in range(levels)),
            residuals_per_level=count("unet.down_blocks.0.resnets."),
            depths=tuple(
                count(f"unet.down_blocks.{level}.attentions.0.transformer_blocks.") for level in range(levels)
            ),
            middle_depth=count("unet.mid_block.attentions.0.transformer_blocks."),
            heads=(1,) * levels,
            guidance_width=1,
        ),
        vae=replace(
            SDXL.vae,
            multipliers=tuple(2**level for level in range(vae_levels)),
            residuals_per_level=count("vae.encoder.down_blocks.0.resnets."),
        ),
        **{
            text: replace(OPEN_CLIP_BIG_G, layers=count(f"{text}.text_model.encoder.layers."))
            for text in ("text_encoder", "text_encoder_2")
        },
    )
    unused = {}
    if any(name.startswith(f"{DEPTH_ESTIMATOR}.") for name in names):
        from convert.layouts.depth_layout import counted_config, unused_names

        if depth := counted_config(names, LIMITS.text_layers):
            widest = replace(widest, depth=depth)
            unused = {theirs: original for original, theirs in unused_names(depth).items()}
    originals = original_names(widest)
    return unused | {theirs.name: originals[ours].name for ours, theirs in diffusers_names(widest).items()}
