"""The text encoders of Stable Diffusion XL: the same transformer, of which an inner layer and the last one are read.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023), section 2.1.
B batch, T tokens, D width.
"""

import torch
from torch import Tensor, nn

from sd.config import TextEncoderConfig
from sd.networks.text_encoder import TextEncoder


class TextTower(TextEncoder):
    """A text encoder whose context is the output of an inner layer, without the final norm.

    OpenCLIP's also gives one vector for the whole prompt, from the last layer: the one that it was trained to bring
    near the picture's. Its projection into the space that both share is Radford et al. (2021), figure 3.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        self.skipped_layers = config.skipped_layers
        self.end_token = config.vocabulary - 1  # before the ids of learned words
        self.projection = None
        if config.pooled_width:
            self.projection = nn.Linear(config.width, config.pooled_width, bias=False)

    def forward(self, tokens: Tensor, *, skip_layers: int = 0) -> Tensor:
        """The context alone, as of other text encoders: (B, T) -> (B, T, D)"""
        return self.encode(tokens, skip_layers=skip_layers)[0]

    def encode(self, tokens: Tensor, *, skip_layers: int = 0) -> tuple[Tensor, Tensor | None]:
        """Encode prompts.

        tokens       (B, T) int64, each row with an end token; a tensor, or the tokenizer's array
        skip_layers  how many of the last layers the context does without, if more than the family does
        returns      the context (B, T, D), and the vector of each prompt (B, pooled width), if there is one

        Raises ValueError if there are more tokens than positions, or no layer is left.
        """
        if not 0 <= skip_layers < len(self.layers):
            raise ValueError(f"skip_layers must be 0 to {len(self.layers) - 1}, got {skip_layers}")
        inner = len(self.layers) - max(skip_layers, self.skipped_layers)
        x = self.embed(tokens)
        for layer in self.layers[:inner]:
            x = layer(x)
        context = x
        if self.projection is None:
            return context, None
        for layer in self.layers[inner:]:
            x = layer(x)
        at_end = torch.as_tensor(tokens, dtype=torch.int64, device=x.device) == self.end_token
        first = at_end.int().argmax(dim=-1)  # other end tokens may pad the row
        rows = torch.arange(len(x), dtype=torch.int64, device=x.device)
        return context, self.projection(self.final_norm(x[rows, first]))
