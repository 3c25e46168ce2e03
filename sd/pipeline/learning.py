"""Textual inversion: words that are added to a model's own."""

from collections.abc import Sequence

import torch

from sd.networks.learned_rows import with_rows
from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.text.learned_words import LearnedTokenizer, LearnedWord
from sd.text.tokenizer import Tokenizer


def teach(model: LatentDiffusion, words: Sequence[LearnedWord]) -> None:
    """Add words to those of the text encoder, in place of the ones added before; [] takes all off again, to the bit.

    The tokenizer then gives their ids, and the token embedding has their vectors. Of two words with one name, the
    first counts.

    Raises ValueError for vectors of another width than the text encoder's.
    """
    width = model.text_encoder.token_embedding.embedding_dim
    for name, shape in ((word.name, word.vectors.shape) for word in words):
        if shape[1:] != (width,):
            raise ValueError(f"the vectors of {name!r} must have the shape (n, {width}), got {shape}")
    framing = {"context_length": model.tokenizer.context_length, "pad_token": model.tokenizer.pad_token}
    tokenizer = LearnedTokenizer(**framing, words=tuple(words)) if words else Tokenizer(**framing)
    rows = [torch.as_tensor(word.vectors, dtype=torch.float32, device="cpu") for word in words]
    embedding = with_rows(
        model.text_encoder.token_embedding,
        torch.cat(rows) if rows else torch.empty(0, width, dtype=torch.float32, device="cpu"),
    )
    model.text_encoder.token_embedding, model.tokenizer, model.words = embedding, tokenizer, tuple(words)


def teach_bundled(model: LatentDiffusion, words: Sequence[LearnedWord]) -> None:
    """Add the words that the applied adapters bring along, in place of those of the ones applied before."""
    kept = [word for word in model.words if not word.bundled]
    if len(kept) != len(model.words) or words:
        teach(model, [*kept, *words])
