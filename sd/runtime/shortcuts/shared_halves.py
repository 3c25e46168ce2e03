"""Guidance asks the UNet twice about the same latents, in one batch. Up to the first look at the words, once is enough.

That is the first convolution, the first residual block, and the self-attention of the first transformer, at the full
size of the latents. The UNet does not know: as in `sd.runtime.seamless`, two of its forward functions are others for a
while.

B pictures; the context has 2 B rows, the negative prompts' first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from sd.networks.attention import SpatialTransformer
from sd.networks.unet import UNet, timestep_embedding
from sd.runtime.patching import exchanged


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def halves_shared(unet: UNet) -> AbstractContextManager[None]:
    """As long as it lasts, the network takes the second half of its latents to be the same as the first."""
    return exchanged(sharing(unet))


def sharing(unet: UNet) -> dict[nn.Module, Callable[..., Tensor]]:
    """The two forward functions that do so, by the modules that they are for."""
    first = next(module for module in unet.modules() if isinstance(module, SpatialTransformer))
    return {unet: _forward(unet), first: _doubling(first)}


def _forward(unet: UNet) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """That of the UNet, with half of the latents until the first transformer doubles them."""

    def forward(x_t: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """x_t (2 B, C, H, W), timestep (), context (2 B, S, context width) -> (2 B, out channels, H, W)"""
        time = unet.time_embed(timestep_embedding(timestep, unet.width).to(x_t.dtype))
        x, skips = x_t.chunk(2)[0], []
        for block in unet.input_blocks:
            x = block(x, time, context)
            skips.append(x)
        skips = [skip if len(skip) == len(context) else twice(skip) for skip in skips]
        x = unet.middle_block(x, time, context)
        for block in unet.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, time, context, size=skips[-1].shape[-2:] if skips else None)
        return unet.out(x)

    return forward


def _doubling(transformer: SpatialTransformer) -> Callable[[Tensor, Tensor], Tensor]:
    """That of a transformer, from B rows to 2 B: doubled where its first block turns from the picture to the words."""

    def forward(x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (2 B, S, context width) -> (2 B, C, H, W)"""
        height, width = x.shape[-2:]
        tokens = transformer.proj_in(transformer.norm(x).flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, H*W, C)
        block, *others = transformer.blocks
        tokens = twice(tokens + block.self_attention(block.norm1(tokens)))
        tokens = tokens + block.cross_attention(block.norm2(tokens), context)
        tokens = tokens + block.feed_forward(block.norm3(tokens))
        for block in others:
            tokens = block(tokens, context)
        tokens = transformer.proj_out(tokens)
        return twice(x) + tokens.transpose(1, 2).unflatten(-1, (height, width))

    return forward
