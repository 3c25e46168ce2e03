"""Textual inversion: words that are added to a model's own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sd.networks.learned_rows import with_rows
from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.text.learned_words import LearnedTokenizer, LearnedWord
from sd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np


def teach(model: LatentDiffusion, words: Sequence[LearnedWord]) -> None:
    """Add words to those of the text encoders, in place of the ones added before; [] takes all off again, to the bit.

    The tokenizer then gives their ids, and each token embedding has their vectors. Of two words with one name, the
    first counts.

    Raises ValueError for vectors of another width than a text encoder's.
    """
    rows = {}
    for part, vectors in (("text_encoder", "vectors"), ("text_encoder_2", "vectors_2")):
        if encoder := getattr(model, part):
            found = [(word.name, getattr(word, vectors)) for word in words]
            rows[encoder] = _rows(found, encoder.token_embedding.embedding_dim)
    framing = {"context_length": model.tokenizer.context_length, "pad_token": model.tokenizer.pad_token}
    model.tokenizer = LearnedTokenizer(**framing, words=tuple(words)) if words else Tokenizer(**framing)
    for encoder, learned in rows.items():
        encoder.token_embedding = with_rows(encoder.token_embedding, learned)
    model.words = tuple(words)


def _rows(words: Sequence[tuple[str, "np.ndarray | None"]], width: int) -> Tensor:
    """The vectors of all words, one below the other."""
    for name, vectors in words:
        if (shape := () if vectors is None else vectors.shape)[1:] != (width,):
            raise ValueError(f"the vectors of {name!r} must have the shape (n, {width}), got {shape}")
    rows = [torch.as_tensor(vectors, dtype=torch.float32, device="cpu") for _, vectors in words]
    return torch.cat(rows) if rows else torch.empty(0, width, dtype=torch.float32, device="cpu")


def teach_bundled(model: LatentDiffusion, words: Sequence[LearnedWord]) -> None:
    """Add the words that the applied adapters bring along, in place of those of the ones applied before."""
    kept = [word for word in model.words if not word.bundled]
    if len(kept) != len(model.words) or words:
        teach(model, [*kept, *words])
