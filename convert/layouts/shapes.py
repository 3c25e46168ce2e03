"""The shape of every parameter, from the config alone.

The networks in `sd/` have the same shapes, but they are made of torch, which takes longer to import than it takes to
copy a gigabyte. Tests compare the two.
"""

from collections.abc import Iterator

from sd.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sd.networks.block_plan import BlockRow, block_plan

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model, `unet.… vae.… text_encoder.…`."""
    components = {
        "text_encoder": text_encoder(config.text_encoder),
        "unet": unet(config.unet),
        "vae": vae(config.vae),
    }
    return {f"{component}.{name}": shape for component, found in components.items() for name, shape in found}


def linear(name: str, width: int, out: int, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def conv(name: str, channels: int, out: int, kernel: int = 3) -> Shapes:
    yield f"{name}.weight", (out, channels, kernel, kernel)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def residual(name: str, channels: int, out: int, time_width: int = 0) -> Shapes:
    yield from norm(f"{name}.norm1", channels)
    yield from conv(f"{name}.conv1", channels, out)
    if time_width:
        yield from linear(f"{name}.time_proj", time_width, out)
    yield from norm(f"{name}.norm2", out)
    yield from conv(f"{name}.conv2", out, out)
    if channels != out:
        yield from conv(f"{name}.skip", channels, out, 1)


def attention(name: str, width: int, context_width: int, *, bias: bool) -> Shapes:
    yield from linear(f"{name}.q", width, width, bias=bias)
    yield from linear(f"{name}.k", context_width, width, bias=bias)
    yield from linear(f"{name}.v", context_width, width, bias=bias)
    yield from linear(f"{name}.out", width, width)


def spatial_transformer(name: str, width: int, context_width: int, depth: int) -> Shapes:
    yield from norm(f"{name}.norm", width)
    yield from linear(f"{name}.proj_in", width, width)
    for block in (f"{name}.blocks.{number}" for number in range(depth)):
        yield from norm(f"{block}.norm1", width)
        yield from attention(f"{block}.self_attention", width, width, bias=False)
        yield from norm(f"{block}.norm2", width)
        yield from attention(f"{block}.cross_attention", width, context_width, bias=False)
        yield from norm(f"{block}.norm3", width)
        yield from linear(f"{block}.feed_forward.proj_in", width, 2 * 4 * width)
        yield from linear(f"{block}.feed_forward.proj_out", 4 * width, width)
    yield from linear(f"{name}.proj_out", width, width)


def unet(config: UNetConfig) -> Shapes:
    time_width = 4 * config.width
    yield from linear("time_embed.linear1", config.width, time_width)
    yield from linear("time_embed.linear2", time_width, time_width)
    for row in block_plan(config):
        yield from unet_block(row, time_width, config.context_width)
    yield from norm("out.norm", config.width * config.multipliers[0])
    yield from conv("out.conv", config.width * config.multipliers[0], config.out_channels)


def unet_block(row: BlockRow, time_width: int, context_width: int) -> Shapes:
    channels, width = row.in_channels, row.out_channels
    for layer in row.layers:
        name = f"{row.name}.{layer}"
        if layer == "conv":
            yield from conv(name, channels, width)
        elif layer in ("downsample", "upsample"):
            yield from conv(f"{name}.conv", width, width)
        elif layer == "attention":
            yield from spatial_transformer(name, width, context_width, row.depth)
        else:
            yield from residual(name, channels, width, time_width)
            channels = width


def vae(config: VAEConfig) -> Shapes:
    widths = [config.width * multiplier for multiplier in config.multipliers]
    latents, deepest = config.latent_channels, widths[-1]
    yield from conv("quant_conv", 2 * latents, 2 * latents, 1)
    yield from conv("post_quant_conv", latents, latents, 1)
    for half, first, last in (
        ("encoder", (config.image_channels, widths[0]), (deepest, 2 * latents)),
        ("decoder", (latents, deepest), (widths[0], config.image_channels)),
    ):
        yield from conv(f"{half}.conv_in", *first)
        for number in (1, 2):
            yield from residual(f"{half}.mid.residual{number}", deepest, deepest)
        yield from norm(f"{half}.mid.attention.norm", deepest)
        yield from attention(f"{half}.mid.attention.attention", deepest, deepest, bias=True)
        yield from norm(f"{half}.norm_out", last[0])
        yield from conv(f"{half}.conv_out", *last)
    down = zip((widths[0], *widths), widths, strict=False)  # channels before and after each level
    up = zip(widths, (*widths[1:], deepest), strict=True)
    yield from vae_levels("encoder.down", down, config.residuals_per_level, len(widths) - 1)
    yield from vae_levels("decoder.up", ((before, after) for after, before in up), config.residuals_per_level + 1, 0)


def vae_levels(path: str, changes: Iterator[tuple[int, int]], residuals: int, last: int) -> Shapes:
    for level, (channels, width) in enumerate(changes):
        for number in range(residuals):
            yield from residual(f"{path}.{level}.residuals.{number}", channels if number == 0 else width, width)
        if level != last:
            yield from conv(f"{path}.{level}.resample.conv", width, width)


def text_encoder(config: TextEncoderConfig) -> Shapes:
    width = config.width
    yield "token_embedding.weight", (config.vocabulary, width)
    yield "position_embedding.weight", (config.context_length, width)
    for layer in (f"layers.{number}" for number in range(config.layers)):
        yield from norm(f"{layer}.norm1", width)
        yield from attention(f"{layer}.attention", width, width, bias=True)
        yield from norm(f"{layer}.norm2", width)
        yield from linear(f"{layer}.feed_forward.proj_in", width, config.hidden_width)
        yield from linear(f"{layer}.feed_forward.proj_out", config.hidden_width, width)
    yield from norm("final_norm", width)
