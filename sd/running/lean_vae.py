"""The VAE in less memory: nothing is kept that nobody needs any more.

At 512x512, one array of the decoder's last level takes 67 or 134 MB in bf16, and a residual block as it is written has
up to four of them at a time: here SiLU and sum take the place of what they read, with the same results, to the bit.
And where a process keeps freed memory (`sd.runtime.keep_freed_memory`), arrays of one level leave holes that those of
the next, twice as large, do not fit into: before each level, holes are given back. As elsewhere in this folder, the
network does not know.

B batch, C channels, H W height and width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.running.exchange import exchanged
from sd.runtime import give_back_freed_memory
from sd.vae import VAE, Level, ResidualBlock

LARGE = 1 << 21  # numbers that a level begins with: all levels of v1's decoder at 512x512


def lean(vae: VAE) -> AbstractContextManager[None]:
    """As long as it lasts, the VAE computes so, where no gradients are wanted."""
    if torch.is_grad_enabled():
        return exchanged({})
    blocks = {module: _in_place(module) for module in vae.modules() if isinstance(module, ResidualBlock)}
    levels = {module: _given_back_before(module) for module in vae.decoder.modules() if isinstance(module, Level)}
    return exchanged({**blocks, **levels})


def _in_place(block: ResidualBlock) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        """`ResidualBlock.forward`: (B, C, H, W) -> (B, out channels, H, W)"""
        h = block.conv1(F.silu(block.norm1(x), inplace=True))
        h = block.conv2(F.silu(block.norm2(h), inplace=True))
        return h.add_(block.skip(x))

    return forward


def _given_back_before(level: Level) -> Callable[[Tensor], Tensor]:
    plain = level.forward

    def forward(x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.numel() >= LARGE:
            give_back_freed_memory()
        return plain(x)

    return forward
