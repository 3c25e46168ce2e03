"""Diffusers' names in all their spellings: recognise them, and find the original name that each stands for."""

import re
from collections.abc import Iterable
from dataclasses import replace

from convert.errors import WeightMismatchError
from convert.files.limits import LIMITS
from convert.layouts.names import PREFIXES, TEXT_PREFIX, diffusers_names, original_names
from sd.config import SD_V1

# The attention in the VAE's middle, in the original, in diffusers since 0.17 and before it; tools mix the spellings.
VAE_ATTENTION = (
    ("norm", "group_norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)
MIDDLE_ATTENTION = re.compile(r"((?:en|de)coder\.mid(\.attn_1|_block\.attentions\.0)\.)(.+)\.(weight|bias)")
COMPONENTS = ("unet", "vae", "text_encoder")
OTHER_PREFIXES = {  # of whole models in one file, as some write it
    "te.": "text_encoder.",
    "text_encoder.transformer.": "text_encoder.",
}
ROOTS = (  # names that start so tell the layout of the network -> its root there, and the root that goes with it
    (("unet.time_embed.", "unet.input_blocks."), "unet.", PREFIXES["unet"]),
    (("vae.encoder.down.", "vae.decoder.up."), "vae.", PREFIXES["vae"]),
    (("model.diffusion_model.down_blocks.",), PREFIXES["unet"], "unet."),
    (("first_stage_model.encoder.down_blocks.", "first_stage_model.decoder.up_blocks."), PREFIXES["vae"], "vae."),
)
BARE_UNET = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")  # original names, no prefix
BARE_VAE = (
    *(f"{half}.{part}" for half in ("encoder", "decoder") for part in ("down.", "up.", "mid.", "conv_", "norm_out.")),
    "quant_conv.",
    "post_quant_conv.",
)
BARE_PARTS = {  # component -> how its names begin in a file of its own
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "conv_in.", "conv_norm_out.", "conv_out."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
TELLING = ("unet.down_blocks.", "unet.mid_block.", "vae.encoder.down_blocks.", "vae.decoder.up_blocks.")
TELLING += ("down_blocks.", "mid_block.", "encoder.down_blocks.", "decoder.up_blocks.")
TELLING += tuple(f"text_encoder.{start}" for start in ("text_model.", "transformer.text_model.", "embeddings."))


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the names of a single file are diffusers', those of a whole model or of one component."""
    return any(name.startswith(TELLING) for name in names)


def vae_attention_name(name: str) -> str:
    """A name in which the attention of a VAE is spelled as in the layout of the block around it."""
    match = MIDDLE_ATTENTION.search(name) if "coder.mid" in name else None
    row = next((row for row in VAE_ATTENTION if match and match[3] in row), None)
    if not row:
        return name
    return f"{name[: match.start(3)]}{row[0] if match[2] == '.attn_1' else row[1]}.{match[4]}"


def current_name(name: str) -> str:
    """A name as diffusers writes it today, with its component in front, from one that other versions wrote."""
    for component, starts in BARE_PARTS.items():
        if name.startswith(starts):
            name = f"{component}.{name}"
    for other, prefix in OTHER_PREFIXES.items():
        if name.startswith(other):
            name = prefix + name.removeprefix(other)
    if name.startswith("text_encoder.") and not name.startswith("text_encoder." + TEXT_PREFIX):
        return name.replace("text_encoder.", "text_encoder." + TEXT_PREFIX, 1)
    return name


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
        SD_V1,
        unet=replace(
            SD_V1.unet,
            multipliers=tuple(2**level for level in range(levels)),
            residuals_per_level=count("unet.down_blocks.0.resnets."),
            depths=tuple(
                count(f"unet.down_blocks.{level}.attentions.0.transformer_blocks.") for level in range(levels)
            ),
            middle_depth=count("unet.mid_block.attentions.0.transformer_blocks."),
            heads=(1,) * levels,
        ),
        vae=replace(
            SD_V1.vae,
            multipliers=tuple(2**level for level in range(vae_levels)),
            residuals_per_level=count("vae.encoder.down_blocks.0.resnets."),
        ),
        text_encoder=replace(SD_V1.text_encoder, layers=count("text_encoder.text_model.encoder.layers.")),
    )
    originals = original_names(widest)
    return {theirs.name: originals[ours].name for ours, theirs in diffusers_names(widest).items()}
