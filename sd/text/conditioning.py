"""From chunks of tokens to the context that the UNet attends to, with the prompt's weights applied.

B prompts, N chunks each, T tokens in a chunk, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd.text.chunks import Chunk


def weighted(vectors: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's vector by its weight, then rescale all of them to the mean they had before.

    vectors  (T, D) of one chunk, from the text encoder
    weights  (T,)
    returns  (T, D) in the dtype of the vectors

    This is in no paper: it is what the web UI does for which most prompts are written. The mean is one number, over
    all T * D values.
    """
    scaled = vectors.float() * weights[:, None]
    return (scaled * (vectors.float().mean() / scaled.mean())).to(vectors.dtype)


def encode_chunks(
    text_encoder: Callable[..., Tensor], rows: Sequence[Sequence[Chunk]], *, skip_layers: int = 0
) -> Tensor:
    """Encode the chunks of each prompt: B rows of N chunks -> context (B, N * T, D).

    Equal rows of tokens are encoded once, whatever their weights.
    """
    ids = list(dict.fromkeys(chunk.ids for row in rows for chunk in row))
    vectors = dict(
        zip(ids, text_encoder(torch.tensor(ids, dtype=torch.int64, device="cpu"), skip_layers=skip_layers), strict=True)
    )

    def context(chunk: Chunk) -> Tensor:
        encoded = vectors[chunk.ids]
        if all(weight == 1 for weight in chunk.weights):
            return encoded
        return weighted(encoded, torch.tensor(chunk.weights, dtype=torch.float32, device=encoded.device))

    return torch.stack([torch.cat([context(chunk) for chunk in row]) for row in rows])


@dataclass(frozen=True)
class ContextByStep:
    """The context of a batch whose prompts may change from step to step."""

    encoded: Tensor  # (texts, N * T, D), each different text once
    rows: Sequence[tuple[int, ...]]  # for each step, the index of each picture's text in `encoded`

    def __call__(self, step: int) -> Tensor:
        """(B, N * T, D)"""
        return self.encoded[list(self.rows[step])]

    def changes(self, step: int) -> bool:
        """Whether the context differs from the one at the previous step."""
        return self.rows[step] != self.rows[step - 1]
