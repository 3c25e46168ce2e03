"""What the UNet of Stable Diffusion XL reads in training. B pictures, T tokens, D width of both contexts together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sd.config import ModelConfig
from sd.networks.text_tower import TextTower
from sd.pipeline.vector import numbers_about, vector_of


class Conditions(nn.Module):
    """Both text encoders: prompts -> their contexts side by side, and the vector.

    An empty prompt is zeros, apart from the sizes, as in `sd.pipeline.vector.vectors_for`. The sizes are those of a
    picture at the native size that was neither scaled nor cropped.
    """

    def __init__(self, config: ModelConfig, towers: Sequence[TextTower]):
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.end, self.padding = config.text_encoder.pad_token, config.text_encoder_2.pad_token
        self.numbers = numbers_about(6, (config.native_size, config.native_size))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T), padded for the first text encoder -> context (B, T, D), vector (B, V)"""
        ends = (tokens == self.end).int()  # the first text encoder's rows are filled with end tokens
        after_end = ends.cumsum(dim=1) > 1
        first = self.towers[0](tokens)
        second, pooled = self.towers[1].encode(tokens.masked_fill(after_end, self.padding))
        given = ends[:, 1] == 0
        context = torch.cat([first, second], dim=-1) * given[:, None, None]
        return context, vector_of(pooled * given[:, None], self.numbers)
