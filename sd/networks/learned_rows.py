"""Textual inversion: a token embedding with rows for words that CLIP does not have.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion" (2022), 3.2:
of all the numbers of a model, only the vectors that these ids stand for are new. V rows in the vocabulary, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedRows(nn.Embedding):
    """A token embedding (V, D) and behind it n further rows, for the ids from V to V + n - 1.

    embedding  whose weights are used, not copied
    rows       (n, D); they are no parameter, so a model with them has the same weights as without

    The rows keep their precision, and are rounded to that of the weights where they are used.
    """

    def __init__(self, embedding: nn.Embedding, rows: Tensor):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.weight.requires_grad_(embedding.weight.requires_grad)
        self.rows = rows

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)"""
        learned = tokens - self.num_embeddings
        own = F.embedding(tokens.clamp(max=self.num_embeddings - 1), self.weight)
        rows = F.embedding(learned.clamp(min=0), self.rows.to(own))
        return torch.where((learned >= 0)[..., None], rows, own)


def with_rows(embedding: nn.Embedding, rows: Tensor) -> nn.Embedding:
    """The token embedding with these rows (n, D) instead of those that it may have; without any, a plain one."""
    if len(rows):
        return LearnedRows(embedding, rows)
    plain = nn.Embedding(*embedding.weight.shape, _weight=embedding.weight)
    plain.weight.requires_grad_(embedding.weight.requires_grad)
    return plain
