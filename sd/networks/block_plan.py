"""The layers of the UNet, block by block. Needs no torch, so that the converter can import it too."""

from collections.abc import Sequence
from dataclasses import dataclass

from sd.config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One row of the plan: what a block consists of."""

    name: str  # "input_blocks.4": also the name of the module
    layers: tuple[str, ...]  # in the order they run
    in_channels: int  # with those of the skip
    out_channels: int
    skip_channels: int  # the part of in_channels that comes from the way down
    heads: int  # attention heads; 0 without attention
    depth: int  # transformer blocks in the attention; 0 without attention
    scale: int  # each side of the output is 1/scale of that of the latents

    def __str__(self) -> str:
        channels = f"{self.in_channels:4} -> {self.out_channels:4}"
        layers, heads = " ".join(self.layers), self.heads or "-"
        return f"{self.name:<17} {layers:<29} {channels} {self.skip_channels:5} {heads:>6} {f'1/{self.scale}':>6}"


def block_plan(config: UNetConfig) -> list[BlockRow]:
    """The blocks in the order they run: 12 in, 1 middle, 12 out for Stable Diffusion v1 and v2."""
    plan: list[BlockRow] = []
    skips: list[int] = []  # channels of the outputs on the way down
    widths = [config.width * multiplier for multiplier in config.multipliers]  # channels by level
    last = len(widths) - 1

    def add(stage: str, layers: Sequence[str], channels: int, width: int, level: int, *, skip: int = 0, depth: int = 0):
        """Append a block that takes `channels` (and those of the skip) and gives `width`."""
        index = sum(row.name.startswith(stage) for row in plan)
        row = BlockRow(
            name=stage if stage == "middle_block" else f"{stage}.{index}",
            layers=tuple(layers),
            in_channels=channels + skip,
            out_channels=width,
            skip_channels=skip,
            heads=config.heads[level] if depth else 0,
            depth=depth,
            scale=2 ** (level - layers.count("upsample") + layers.count("downsample")),
        )
        plan.append(row)

    def layers_at(level: int) -> list[str]:
        return ["residual", "attention"] if config.depths[level] else ["residual"]

    channels = widths[0]
    add("input_blocks", ["conv"], config.in_channels, channels, 0)
    skips.append(channels)
    for level, width in enumerate(widths):
        for _ in range(config.residuals_per_level):
            add("input_blocks", layers_at(level), channels, width, level, depth=config.depths[level])
            channels = width
            skips.append(channels)
        if level < last:
            add("input_blocks", ["downsample"], channels, channels, level)
            skips.append(channels)

    middle = ["residual1", "attention", "residual2"] if config.middle_depth else ["residual1", "residual2"]
    add("middle_block", middle, channels, channels, last, depth=config.middle_depth)

    for level, width in reversed(list(enumerate(widths))):
        for i in range(config.residuals_per_level + 1):
            goes_up = level > 0 and i == config.residuals_per_level
            layers = layers_at(level) + ["upsample"] * goes_up
            add("output_blocks", layers, channels, width, level, skip=skips.pop(), depth=config.depths[level])
            channels = width
    return plan
