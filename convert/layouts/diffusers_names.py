"""Where the diffusers library keeps each parameter of ours: tables of plain strings, relative to one block.

As in `convert.layouts.names`, an entry stands for a module's weight and bias, or, ending in `.weight`, for the weight
alone. Inside a transformer block, and in the whole text encoder, diffusers' names are the original ones.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from convert.errors import WeightMismatchError
from convert.files.limits import LIMITS
from convert.layouts.names import (
    POINTWISE,
    TRANSFORMER_BLOCK,
    Original,
    expand,
    original_names,
    residual_names,
    text_encoder_names,
)
from sd.config import SD_V1, ModelConfig, UNetConfig, VAEConfig
from sd.networks.block_plan import BlockRow, block_plan

# ours -> diffusers, relative to one block of the UNet
RESIDUAL_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",  # only where the number of channels changes
}
SPATIAL_TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
}
UNET_ENDS = {
    "time_embed.linear1": "time_embedding.linear_1",
    "time_embed.linear2": "time_embedding.linear_2",
    "out.norm": "conv_norm_out",
    "out.conv": "conv_out",
}

# ours -> diffusers, relative to one block of the VAE
VAE_RESIDUAL_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",  # only where the number of channels changes
}
VAE_ATTENTION = {
    "norm": "group_norm",
    "attention.q": "to_q",
    "attention.k": "to_k",
    "attention.v": "to_v",
    "attention.out": "to_out.0",
}
OLD_VAE_ATTENTION = {  # before diffusers 0.17 -> since then
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
VAE_ENDS = {  # in the encoder and in the decoder
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}

COMPONENTS = ("unet", "vae", "text_encoder")
TEXT_PREFIX = "text_model."  # of the text encoder's names; transformers 5 leaves it out
OTHER_PREFIXES = {"te.": "text_encoder.", "first_stage_model.": "vae."}  # of whole models in one file, as some write it
BARE_PARTS = {  # component -> how its names begin in a file of its own
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "conv_in.", "conv_norm_out.", "conv_out."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
TELLING = ("unet.down_blocks.", "unet.mid_block.", "vae.encoder.down_blocks.", "vae.decoder.up_blocks.")
TELLING += ("down_blocks.", "mid_block.", "encoder.down_blocks.", "decoder.up_blocks.")
MIDDLE_ATTENTION = ("vae.encoder.mid_block.attentions.0.", "vae.decoder.mid_block.attentions.0.")


def block_names(row: BlockRow, residuals: int) -> Iterator[tuple[str, str]]:
    """One row of the plan: the original counts the blocks through, diffusers counts level by level."""
    stage, _, number = row.name.partition(".")
    index = int(number or 0)
    if stage == "input_blocks":
        level, slot = divmod(index - 1, residuals + 1)
        path = f"down_blocks.{level}"
    elif stage == "output_blocks":
        level, slot = divmod(index, residuals + 1)
        path = f"up_blocks.{level}"
    else:
        path, slot = "mid_block", 0
    channels = row.in_channels
    for layer in row.layers:
        ours = f"{row.name}.{layer}"
        if layer == "conv":
            yield from expand({"": "conv_in"}, ours, "")
        elif layer in ("downsample", "upsample"):
            yield from expand({"conv": "conv"}, f"{ours}.", f"{path}.{layer}rs.0.")
        elif layer == "attention":
            yield from expand(SPATIAL_TRANSFORMER, f"{ours}.", f"{path}.attentions.{slot}.")
            for depth in range(row.depth):
                inner = f"{ours}.blocks.{depth}.", f"{path}.attentions.{slot}.transformer_blocks.{depth}."
                yield from expand(TRANSFORMER_BLOCK, *inner)
        else:
            theirs = f"{path}.resnets.{1 if layer == 'residual2' else slot}."
            yield from residual_names(RESIDUAL_BLOCK, f"{ours}.", theirs, channels == row.out_channels)
            channels = row.out_channels


def unet_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    yield from expand(UNET_ENDS, "", "")
    for row in block_plan(config):
        yield from block_names(row, config.residuals_per_level)


def vae_names(config: VAEConfig) -> Iterator[tuple[str, str]]:
    multipliers, levels = config.multipliers, len(config.multipliers)
    yield from expand({"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}, "", "")
    for half in ("encoder", "decoder"):
        yield from expand(VAE_ENDS, f"{half}.", f"{half}.")
        yield from residual_names(VAE_RESIDUAL_BLOCK, f"{half}.mid.residual1.", f"{half}.mid_block.resnets.0.", True)
        yield from expand(VAE_ATTENTION, f"{half}.mid.attention.", f"{half}.mid_block.attentions.0.")
        yield from residual_names(VAE_RESIDUAL_BLOCK, f"{half}.mid.residual2.", f"{half}.mid_block.resnets.1.", True)
    for level, after in enumerate(multipliers):
        before = (1, *multipliers)[level]
        for index in range(config.residuals_per_level):
            ours, theirs = f"encoder.down.{level}.residuals.{index}.", f"encoder.down_blocks.{level}.resnets.{index}."
            yield from residual_names(VAE_RESIDUAL_BLOCK, ours, theirs, index > 0 or before == after)
        if level < levels - 1:
            resample = f"encoder.down.{level}.resample.", f"encoder.down_blocks.{level}.downsamplers.0."
            yield from expand({"conv": "conv"}, *resample)
        before, block = multipliers[min(level + 1, levels - 1)], levels - 1 - level  # diffusers counts as it runs
        for index in range(config.residuals_per_level + 1):
            ours, theirs = f"decoder.up.{level}.residuals.{index}.", f"decoder.up_blocks.{block}.resnets.{index}."
            yield from residual_names(VAE_RESIDUAL_BLOCK, ours, theirs, index > 0 or before == after)
        if level > 0:
            resample = f"decoder.up.{level}.resample.", f"decoder.up_blocks.{block}.upsamplers.0."
            yield from expand({"conv": "conv"}, *resample)


def diffusers_names(config: ModelConfig) -> dict[str, Original]:
    """Every parameter of a v1 model with where a diffusers folder keeps it: `<component>.<name in its file>`."""
    components = {
        "unet": unet_names(config.unet),
        "vae": vae_names(config.vae),
        "text_encoder": ((ours, TEXT_PREFIX + theirs) for ours, theirs in text_encoder_names(config.text_encoder)),
    }
    return {
        f"{component}.{ours}": Original(f"{component}.{theirs}", 2 * (component == "unet" and ours.endswith(POINTWISE)))
        for component, names in components.items()
        for ours, theirs in names
    }


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the names of a single file are diffusers', those of a whole model or of one component."""
    return any(name.startswith(TELLING) for name in names)


def current_name(name: str) -> str:
    """A name as diffusers writes it today, with its component in front, from one that other versions wrote."""
    for component, starts in BARE_PARTS.items():
        if name.startswith(starts):
            name = f"{component}.{name}"
    for other, prefix in OTHER_PREFIXES.items():
        if name.startswith(other):
            name = prefix + name.removeprefix(other)
    if name.startswith(MIDDLE_ATTENTION):
        path, leaf = name.rpartition(".")[::2]
        block, module = path.rpartition(".")[::2]
        return f"{block}.{OLD_VAE_ATTENTION.get(module, module)}.{leaf}"
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
