"""From chunks of tokens to the context that the UNet attends to, with the weights of the prompt in it.

B prompts, N chunks each, T tokens in a chunk, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd.text.chunks import Chunk


def weighted(vectors: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's vector by its weight, then bring all of them back to the mean that they had.

    vectors  (T, D) of one chunk, as the text encoder gives them
    weights  (T,)
    returns  (T, D) in the dtype of the vectors

    No paper has this: it is what the web UI does for which most prompts are written. The mean is one number, that of
    all T * D values.
    """
    scaled = vectors.float() * weights[:, None]
    return (scaled * (vectors.float().mean() / scaled.mean())).to(vectors.dtype)


def encode_chunks(
    text_encoder: Callable[..., Tensor], rows: Sequence[Sequence[Chunk]], *, skip_layers: int = 0
) -> Tensor:
    """B rows of N chunks -> context (B, N * T, D), the chunks of a row one after the other.

    Tokens that occur twice are encoded once, whatever their weights.
    """
    ids = list(dict.fromkeys(chunk.ids for row in rows for chunk in row))
    vectors = dict(zip(ids, text_encoder(torch.tensor(ids), skip_layers=skip_layers), strict=True))

    def context(chunk: Chunk) -> Tensor:
        mine = vectors[chunk.ids]
        if all(weight == 1 for weight in chunk.weights):
            return mine
        return weighted(mine, torch.tensor(chunk.weights, device=mine.device))

    return torch.stack([torch.cat([context(chunk) for chunk in row]) for row in rows])


@dataclass(frozen=True)
class ContextByStep:
    """The context of a batch, for prompts that may change from step to step."""

    encoded: Tensor  # (texts, N * T, D), each text once
    rows: Sequence[tuple[int, ...]]  # for each step: which text each of the B pictures has

    def __call__(self, step: int) -> Tensor:
        """(B, N * T, D)"""
        return self.encoded[list(self.rows[step])]

    def changes(self, step: int) -> bool:
        """Whether it differs from that of the step before."""
        return self.rows[step] != self.rows[step - 1]
