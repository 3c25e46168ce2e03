"""The VAE in less memory: nothing is kept that nobody needs any more.

At 512x512, one array of the decoder's last level takes 67 or 134 MB in bf16, and a residual block as it is written has
up to four of them at a time: here SiLU and sum take the place of what they read, with the same results, to the bit.
And where a process keeps freed memory (`sd.runtime.cpu.process_memory`), arrays of one level leave holes that those of
the next, twice as large, do not fit into: before each level, holes are given back. As elsewhere in this folder, the
network does not know.

B batch, C channels, H W height and width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sd.networks.vae import VAE, Decoder, Level, ResidualBlock
from sd.runtime.cpu.norms import Joined, one_after_the_other
from sd.runtime.cpu.process_memory import give_back_freed_memory
from sd.runtime.patching import exchanged

LARGE = 1 << 21  # numbers that a level begins with: all levels of v1's decoder at 512x512


def lean(vae: VAE, norm_silu: Joined = one_after_the_other) -> AbstractContextManager[None]:
    """As long as it lasts, the VAE computes so, where no gradients are wanted.

    norm_silu  what is done for its norms and the SiLUs behind them
    """
    if torch.is_grad_enabled():
        return exchanged({})
    blocks = {module: _in_place(module, norm_silu) for module in vae.modules() if isinstance(module, ResidualBlock)}
    levels = {module: _given_back_before(module) for module in vae.decoder.modules() if isinstance(module, Level)}
    return exchanged({**blocks, **levels, vae.decoder: _decoder(vae.decoder, norm_silu)})


def _in_place(block: ResidualBlock, norm_silu: Joined) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        """`ResidualBlock.forward`: (B, C, H, W) -> (B, out channels, H, W)"""
        h = block.conv1(norm_silu(block.norm1, x, False))
        h = block.conv2(norm_silu(block.norm2, h, True))
        return h.add_(block.skip(x))

    return forward


def _decoder(decoder: Decoder, norm_silu: Joined) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        """`Decoder.forward`: (B, 4, H, W) -> (B, 3, 8H, 8W)"""
        x = decoder.mid(decoder.conv_in(x))
        for level in reversed(decoder.up):
            x = level(x)
        return decoder.conv_out(norm_silu(decoder.norm_out, x, True))

    return forward


def _given_back_before(level: Level) -> Callable[[Tensor], Tensor]:
    plain = level.forward

    def forward(x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.numel() >= LARGE:
            give_back_freed_memory()
        return plain(x)

    return forward
