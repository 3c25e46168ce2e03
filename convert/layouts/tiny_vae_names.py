"""Every parameter of the tiny VAE: our name, the original's, diffusers', and its shape.

The original files, taesd_encoder and taesd_decoder, number the layers of one half, with and without parameters;
diffusers' AutoencoderTiny holds both halves and does not count the first layer of the decoder, which has none.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from convert.layouts.names import CONV, Parameter, expand
from sd.config import TinyVAEConfig

if TYPE_CHECKING:
    from convert.layouts.names import Table

BLOCK: "Table" = tuple(
    (f"conv{number}", f"conv.{index}", f"conv.{index}", ("width", "width", 3, 3))
    for number, index in ((1, 0), (2, 2), (3, 4))
)
RESAMPLING: "Table" = (("conv.weight", "weight", "weight", ("width", "width", 3, 3)),)


def layers(config: TinyVAEConfig) -> dict[str, list[str]]:
    """The layers of each half in their order, by our names; of one without parameters, the name is empty."""
    encoder, decoder = ["conv_in", "block"], ["", "conv_in", ""]  # the decoder's are tanh and ReLU
    for level in range(config.levels):
        blocks = [f"levels.{level}.blocks.{number}" for number in range(config.blocks_per_level)]
        encoder += [f"levels.{level}", *blocks]  # a convolution
        decoder += [*blocks, "", f"levels.{level}"]  # upsampling, and a convolution
    return {"encoder": [*encoder, "conv_out"], "decoder": [*decoder, "block", "conv_out"]}


def tiny_vae_parameters(config: TinyVAEConfig, half: str) -> Iterator[Parameter]:
    """Every parameter of a half, by its names in that half."""
    first = sum(not name for name in layers(config)[half][:1])  # where diffusers begins to count
    ends = {"channels": config.image_channels, "out": config.latent_channels}
    if half == "decoder":
        ends = {"channels": config.latent_channels, "out": config.image_channels}
    for index, name in enumerate(layers(config)[half]):
        paths = name, str(index), str(index - first)
        if name == "conv_in":
            yield from expand(CONV, paths, channels=ends["channels"], width=config.width)
        elif name == "conv_out":
            yield from expand(CONV, paths, channels=config.width, width=ends["out"])
        elif "block" in name:
            yield from expand(BLOCK, paths, width=config.width)
        elif name:
            yield from expand(RESAMPLING, paths, width=config.width)
