"""With guidance, both halves of a batch are equal up to the first cross-attention: that part is computed once.

It is the first convolution, the first residual block, and the self-attention of the first transformer, at the full
size of the latents. In docs/performance.md: 2 to 4 % of a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sd.networks.attention import SpatialTransformer
from sd.networks.unet import UNet


def computed_once(unet: UNet) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards for a batch whose halves are equal, for the layers before the context is read.

    None where the halves have vectors of their own beside the context, which every residual block reads.
    """
    if unet.label_emb is not None:
        return {}
    layers = []
    for layer in (layer for block in unet.input_blocks for layer in block.values()):
        if isinstance(layer, SpatialTransformer):
            return {each: _on_one_half(each.forward) for each in [*layers, layer.blocks[0].self_attention]}
        layers.append(layer)
    return {}


def _on_one_half(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *others: Tensor) -> Tensor:
        """(2 B, ...) -> (2 B, ...)"""
        half = plain(x[: len(x) // 2], *others)
        return torch.cat([half, half])

    return forward
