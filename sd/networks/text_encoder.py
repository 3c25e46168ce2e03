"""The CLIP text transformer: from token ids to one vector per token, the context that the UNet attends to.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4.
B batch, T tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.config import TextEncoderConfig
from sd.networks.attention import Attention


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI's CLIP was trained with: Hendrycks & Gimpel (2016), section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden_width: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.proj_in = nn.Linear(width, hidden_width)
        self.proj_out = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.activation(self.proj_in(x)))


class EncoderLayer(nn.Module):
    """Causal self-attention, then feed-forward; each adds to its input."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.width, config.heads, bias=True)
        self.norm2 = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config.width, config.hidden_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=True)
        return x + self.feed_forward(self.norm2(x))


class TextEncoder(nn.Module):
    """Token and position embeddings, causal transformer layers, final layer norm."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, *, skip_layers: int = 0) -> Tensor:
        """Encode prompts.

        tokens       (B, T) int64, T at most the context length; a tensor, or the tokenizer's array
        skip_layers  how many of the last layers to skip, one less than "clip skip"; the final norm always runs
        returns      (B, T, D)

        Raises ValueError if there are more tokens than positions, or no layer is left.
        """
        if not 0 <= skip_layers < len(self.layers):
            raise ValueError(f"skip_layers must be 0 to {len(self.layers) - 1}, got {skip_layers}")
        x = self.embed(tokens)
        for layer in self.layers[: len(self.layers) - skip_layers]:
            x = layer(x)
        return self.final_norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """The vectors that the first layer reads: tokens (B, T) -> (B, T, D)"""
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.token_embedding.weight.device)
        length, positions = tokens.shape[-1], self.position_embedding.num_embeddings
        if length > positions:
            raise ValueError(f"the text encoder has {positions} positions, got {length} tokens")
        return self.token_embedding(tokens) + self.position_embedding.weight[:length]
