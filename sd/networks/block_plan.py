"""Which layers the UNet consists of, block by block. Needs no torch, so that the converter can read it too."""

from collections.abc import Sequence
from dataclasses import dataclass

from sd.config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One row of the plan: what a block consists of."""

    name: str  # "input_blocks.4": also the name of the module
    layers: tuple[str, ...]  # in the order in which they run
    in_channels: int  # the skip's included
    out_channels: int
    skip_channels: int  # how many of in_channels come from the way down
    heads: int  # of the attention; 0 where there is none
    depth: int  # transformer blocks in the attention
    scale: int  # the output is this many times smaller than the latents, along each side

    def __str__(self) -> str:
        channels = f"{self.in_channels:4} -> {self.out_channels:4}"
        layers, heads = " ".join(self.layers), self.heads or "-"
        return f"{self.name:<17} {layers:<29} {channels} {self.skip_channels:5} {heads:>6} {f'1/{self.scale}':>6}"


def block_plan(config: UNetConfig) -> list[BlockRow]:
    """The blocks in the order in which they run: 12 in, 1 middle, 12 out for Stable Diffusion v1 and v2."""
    plan: list[BlockRow] = []
    skips: list[int] = []  # channels of the outputs on the way down
    widths = [config.width * multiplier for multiplier in config.multipliers]
    last = len(widths) - 1

    def add(stage: str, layers: Sequence[str], channels: int, width: int, level: int, *, skip: int = 0, depth: int = 0):
        index = sum(row.name.startswith(stage) for row in plan)
        heads = config.heads[level] if depth else 0
        row = BlockRow(
            name=stage if stage == "middle_block" else f"{stage}.{index}",
            layers=tuple(layers),
            in_channels=channels + skip,
            out_channels=width,
            skip_channels=skip,
            heads=heads,
            depth=depth,
            scale=2 ** (level - layers.count("upsample") + layers.count("downsample")),
        )
        plan.append(row)

    def residual(level: int) -> list[str]:
        return ["residual", "attention"] if config.depths[level] else ["residual"]

    channels = widths[0]
    add("input_blocks", ["conv"], config.in_channels, channels, 0)
    skips.append(channels)
    for level, width in enumerate(widths):
        for _ in range(config.residuals_per_level):
            add("input_blocks", residual(level), channels, width, level, depth=config.depths[level])
            channels = width
            skips.append(channels)
        if level < last:
            add("input_blocks", ["downsample"], channels, channels, level)
            skips.append(channels)

    middle = ["residual1", "attention", "residual2"] if config.middle_depth else ["residual1", "residual2"]
    add("middle_block", middle, channels, channels, last, depth=config.middle_depth)

    for level, width in reversed(list(enumerate(widths))):
        for slot in range(config.residuals_per_level + 1):
            ends_level = level > 0 and slot == config.residuals_per_level
            layers = residual(level) + ["upsample"] * ends_level
            add("output_blocks", layers, channels, width, level, skip=skips.pop(), depth=config.depths[level])
            channels = width
    return plan
