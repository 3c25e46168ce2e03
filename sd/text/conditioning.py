"""From chunks of tokens to the context that the UNet attends to, with the prompt's weights applied.

B prompts, N chunks each, T tokens in a chunk, D width, P width of a pooled vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd.text.chunks import Chunk

Tower = Callable[..., tuple[Tensor, Tensor | None]]  # (tokens, skip_layers=) -> context, pooled


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


def encode_in_towers(
    towers: Sequence[tuple[Tower, int, Sequence[Sequence[Chunk]]]], *, skip_layers: int = 0
) -> tuple[Tensor, Tensor]:
    """The same with the text encoders of Stable Diffusion XL: context (B, N * T, D of all of them), pooled (B, P).

    towers  the text encoders, each with the token that pads its rows, and what it reads: B rows of N chunks

    Weights are applied to the context, to that of each encoder apart, as the web UI does. The pooled vector is that of
    the first chunk, without weights.
    """
    contexts, pooled = [], {}
    for tower, pad_token, rows in towers:

        def context_of(tokens: Tensor, *, skip_layers: int, tower: Tower = tower) -> Tensor:
            context, vectors = tower(tokens, skip_layers=skip_layers)
            if vectors is not None:
                pooled.update(zip(map(tuple, tokens.tolist()), vectors, strict=True))
            return context

        padded = [[with_padding(chunk, pad_token) for chunk in row] for row in rows]
        contexts.append(encode_chunks(context_of, padded, skip_layers=skip_layers))
    return torch.cat(contexts, dim=-1), torch.stack([pooled[first.ids] for first, *_ in padded])


def with_padding(chunk: Chunk, pad_token: int) -> Chunk:
    """The same chunk, padded with another token."""
    end = chunk.length + 2  # with start and end token
    return replace(chunk, ids=(*chunk.ids[:end], *[pad_token] * (len(chunk.ids) - end)))


@dataclass(frozen=True)
class ContextByStep:
    """The context of a batch whose prompts may change from step to step."""

    encoded: Tensor  # (texts, N * T, D), each different text once
    rows: Sequence[tuple[int, ...]]  # for each step, the index of each picture's text in `encoded`
    vectors: Tensor | None = None  # (texts, V) beside the context, for families that have them

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """The context (B, N * T, D), and the vectors (B, V) if there are any."""
        texts = list(self.rows[step])
        return tuple(each[texts] for each in (self.encoded, self.vectors) if each is not None)

    def changes(self, step: int) -> bool:
        """Whether the context differs from the one at the previous step."""
        return self.rows[step] != self.rows[step - 1]
