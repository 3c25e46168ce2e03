"""Where the original files keep each parameter of ours: tables of plain strings, relative to one block.

An entry names a module and covers its weight and its bias; an entry that ends in `.weight` covers the weight alone.
Nothing here needs torch.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sd.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sd.networks.block_plan import BlockRow, block_plan

# ours -> original, relative to one block of the UNet
RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",  # only where the number of channels changes
}
SPATIAL_TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
}
TRANSFORMER_BLOCK = {
    "norm1": "norm1",
    "self_attention.q.weight": "attn1.to_q.weight",
    "self_attention.k.weight": "attn1.to_k.weight",
    "self_attention.v.weight": "attn1.to_v.weight",
    "self_attention.out": "attn1.to_out.0",
    "norm2": "norm2",
    "cross_attention.q.weight": "attn2.to_q.weight",
    "cross_attention.k.weight": "attn2.to_k.weight",
    "cross_attention.v.weight": "attn2.to_v.weight",
    "cross_attention.out": "attn2.to_out.0",
    "norm3": "norm3",
    "feed_forward.proj_in": "ff.net.0.proj",
    "feed_forward.proj_out": "ff.net.2",
}
UNET_ENDS = {
    "time_embed.linear1": "time_embed.0",
    "time_embed.linear2": "time_embed.2",
    "out.norm": "out.0",
    "out.conv": "out.2",
}

# ours -> original, relative to one block of the VAE
VAE_RESIDUAL_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "nin_shortcut",  # only where the number of channels changes
}
VAE_ATTENTION = {
    "norm": "norm",
    "attention.q": "q",
    "attention.k": "k",
    "attention.v": "v",
    "attention.out": "proj_out",
}
VAE_ENDS = {  # in the encoder and in the decoder
    "conv_in": "conv_in",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
}

# ours -> original, relative to one layer of the CLIP text transformer
ENCODER_LAYER = {
    "norm1": "layer_norm1",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "feed_forward.proj_in": "mlp.fc1",
    "feed_forward.proj_out": "mlp.fc2",
}
TEXT_ENCODER_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "position_embedding.weight": "embeddings.position_embedding.weight",
    "final_norm": "final_layer_norm",
}

# component -> where the whole file keeps it
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}

# Linear layers of ours that v1 files store as 1x1 convolutions: their weights have two more axes there, of length 1.
POINTWISE = ("attention.proj_in.weight", "attention.proj_out.weight")
VAE_POINTWISE = tuple(f"mid.attention.{name}.weight" for name in VAE_ATTENTION if name != "norm")


class Original(NamedTuple):
    """A parameter in the original file."""

    name: str
    unit_axes: int  # axes of length 1 behind those of our parameter


def expand(
    table: Mapping[str, str], ours: str, original: str, *, without: str | None = None
) -> Iterator[tuple[str, str]]:
    """The parameters of a table under two prefixes: (ours, original); except those of the module `without`."""
    for our_name, original_name in table.items():
        if our_name == without:
            continue
        leaves = [""] if our_name.endswith(".weight") else [".weight", ".bias"]
        for leaf in leaves:
            yield ours + our_name + leaf, original + original_name + leaf


def residual_names(table: Mapping[str, str], ours: str, original: str, same_width: bool) -> Iterator[tuple[str, str]]:
    return expand(table, ours, original, without="skip" if same_width else None)


def block_names(row: BlockRow) -> Iterator[tuple[str, str]]:
    """One row of the plan. The original numbers the layers of a block, ours have names."""
    channels = row.in_channels
    for slot, layer in enumerate(row.layers):
        ours, original = f"{row.name}.{layer}", f"{row.name}.{slot}"
        if layer == "conv":
            yield from expand({"": ""}, ours, original)
        elif layer == "downsample":
            yield from expand({"conv": "op"}, f"{ours}.", f"{original}.")
        elif layer == "upsample":
            yield from expand({"conv": "conv"}, f"{ours}.", f"{original}.")
        elif layer == "attention":
            yield from expand(SPATIAL_TRANSFORMER, f"{ours}.", f"{original}.")
            for depth in range(row.depth):
                inner = f"{ours}.blocks.{depth}.", f"{original}.transformer_blocks.{depth}."
                yield from expand(TRANSFORMER_BLOCK, *inner)
        else:
            yield from residual_names(RESIDUAL_BLOCK, f"{ours}.", f"{original}.", channels == row.out_channels)
            channels = row.out_channels


def unet_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    yield from expand(UNET_ENDS, "", "")
    for row in block_plan(config):
        yield from block_names(row)


def vae_names(config: VAEConfig) -> Iterator[tuple[str, str]]:
    levels = len(config.multipliers)
    yield from expand({"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}, "", "")
    for half in ("encoder", "decoder"):
        yield from expand(VAE_ENDS, f"{half}.", f"{half}.")
        yield from residual_names(VAE_RESIDUAL_BLOCK, f"{half}.mid.residual1.", f"{half}.mid.block_1.", True)
        yield from expand(VAE_ATTENTION, f"{half}.mid.attention.", f"{half}.mid.attn_1.")
        yield from residual_names(VAE_RESIDUAL_BLOCK, f"{half}.mid.residual2.", f"{half}.mid.block_2.", True)
    multipliers = config.multipliers
    down = list(zip((1, *multipliers), multipliers, strict=False))  # channels before and after each level
    up = [(multipliers[min(level + 1, levels - 1)], multipliers[level]) for level in range(levels)]
    for path, changes, residuals, resample, last in (
        ("encoder.down", down, config.residuals_per_level, "downsample", levels - 1),
        ("decoder.up", up, config.residuals_per_level + 1, "upsample", 0),
    ):
        for level, (before, after) in enumerate(changes):
            for index in range(residuals):
                ours, original = f"{path}.{level}.residuals.{index}.", f"{path}.{level}.block.{index}."
                yield from residual_names(VAE_RESIDUAL_BLOCK, ours, original, index > 0 or before == after)
            if level != last:
                yield from expand({"conv": "conv"}, f"{path}.{level}.resample.", f"{path}.{level}.{resample}.")


def text_encoder_names(config: TextEncoderConfig) -> Iterator[tuple[str, str]]:
    yield from expand(TEXT_ENCODER_ENDS, "", "")
    for layer in range(config.layers):
        yield from expand(ENCODER_LAYER, f"layers.{layer}.", f"encoder.layers.{layer}.")


def original_names(config: ModelConfig) -> dict[str, Original]:
    """Every parameter of a v1 model, `unet.… vae.… text_encoder.…`, with where an original file keeps it."""
    components = {
        "unet": unet_names(config.unet),
        "vae": vae_names(config.vae),
        "text_encoder": text_encoder_names(config.text_encoder),
    }
    pointwise = {"unet": POINTWISE, "vae": VAE_POINTWISE, "text_encoder": ()}
    return {
        f"{component}.{ours}": Original(PREFIXES[component] + original, 2 * ours.endswith(pointwise[component]))
        for component, names in components.items()
        for ours, original in names
    }


def ema_name(unet_name: str) -> str:
    """Where a file keeps the averaged copy of a UNet parameter: the dots are gone, and no parsing puts them back."""
    return "model_ema." + unet_name.removeprefix("model.").replace(".", "")
