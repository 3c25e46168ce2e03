"""Attention, and the transformer that lets every position of a feature map attend to the others and to the text.

B batch, T tokens (positions of the feature map, or words), S tokens attended to, D width,
C channels, H W height and width of the feature map.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention: each token of x gathers values from the tokens of the context that match it.

    Vaswani et al., "Attention Is All You Need" (2017), eq. 1 and section 3.2.2. Without a context, x attends to itself.
    """

    def __init__(self, width: int, context_width: int, heads: int, *, bias: bool):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(context_width, width, bias=bias)
        self.v = nn.Linear(context_width, width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """x (B, T, D), context (B, S, context width) -> (B, T, D). Causal: no token sees the ones after it."""
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # -> (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, heads, T, D/heads) -> (B, T, D)


class GEGLU(nn.Module):
    """Feed-forward with a gate: half of the hidden values say how much of the other half passes.

    Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6, with the exact GELU.
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * 4 * width)  # value and gate, each four times as wide
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention over the picture, cross-attention to the text, feed-forward; each adds to its input."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, heads, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_width, heads, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, T, D), context (B, S, context width) -> (B, T, D)"""
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over a feature map: positions become tokens, and afterwards a feature map again.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3 and table 16.
    """

    def __init__(self, channels: int, context_width: int, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)  # a 1x1 convolution in v1 files, which computes the same
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, S, context width) -> (B, C, H, W)"""
        height, width = x.shape[-2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens)
        return x + tokens.transpose(1, 2).unflatten(-1, (height, width))
