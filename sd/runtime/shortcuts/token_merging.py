"""Token merging: self-attention at the largest resolution with fewer tokens.

Before it, similar tokens are merged; afterwards, each of them gets the result of its group: Bolya & Hoffman, "Token
Merging for Fast Stable Diffusion" (2023). In v1 there are 4,096 tokens at 512x512, and attention takes their square.
This changes the picture.

This is the paper's simplest variant: the destinations are the upper left tokens of 2x2 cells, the same for every block
and prediction, so nothing is random; similarity is the cosine between outputs of the block's first norm; and only
self-attention in the blocks with the most tokens is changed. As in the paper, each block matches again. Each row of a
batch is matched by itself, so a picture does not depend on the rest of its batch.

B rows; H W height and width of the latents; T tokens, S of them sources and N destinations; M tokens that are left;
D width.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.networks.attention import SpatialTransformer
from sd.networks.unet import Downsample, UNet, Upsample
from sd.runtime.patching import patched

CELL = 2  # tokens along each side of a cell, which has one destination
ROOM = 2**24  # similarities held at a time: 67 MB


def tokens_merged(unet: UNet, share: float, x: Tensor) -> AbstractContextManager[None]:
    """Within this context, self-attention with the most tokens sees fewer of them, in predictions for x (B, C, H, W).

    share  0 to 1, the share of tokens merged into others; limited by the number of sources, about 3/4
    """
    scale, transformers = with_most_tokens(unet)
    height, width = (math.ceil(side / scale) for side in x.shape[-2:])
    merged = merged_count(share, height, width)
    if not merged:
        return nullcontext()
    sources, destinations = (places.to(x.device) for places in partition(height, width))
    attentions = [block.self_attention for transformer in transformers for block in transformer.blocks]
    return patched({each: merging(each.forward, sources, destinations, merged) for each in attentions})


def with_most_tokens(unet: UNet) -> tuple[int, list[SpatialTransformer]]:
    """The transformers at the largest resolution that has any, and its downsampling factor."""
    scale, found = 1, {}
    for block in [*unet.input_blocks, unet.middle_block, *unet.output_blocks]:
        for layer in block.values():
            if isinstance(layer, Downsample):
                scale *= 2
            elif isinstance(layer, Upsample):
                scale //= 2
            elif isinstance(layer, SpatialTransformer):
                found.setdefault(scale, []).append(layer)
    return min(found.items())


def merged_count(share: float, height: int, width: int) -> int:
    """The number of a grid's tokens to merge: that share of them, or all sources if these are fewer."""
    destinations = math.ceil(height / CELL) * math.ceil(width / CELL)
    return min(round(share * height * width), height * width - destinations)


def partition(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The indices of a grid's tokens, row by row, in two parts: sources (S,), and destinations (N,).

    Destinations are the upper left tokens of 2x2 cells; if a side is odd, the last cells are cut off.
    """
    numbers = torch.arange(height * width, dtype=torch.int64, device="cpu").unflatten(0, (height, width))
    is_destination = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    is_destination[::CELL, ::CELL] = True
    return numbers[~is_destination], numbers[is_destination]


def merging(
    attention: Callable[[Tensor], Tensor], sources: Tensor, destinations: Tensor, merged: int
) -> Callable[[Tensor], Tensor]:
    """Self-attention of T tokens, computed on T - merged of them."""

    def forward(x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        groups = matching(x, sources, destinations, merged)
        return unmerge(attention(merge(x, groups, x.shape[1] - merged)), groups)

    return forward


def matching(x: Tensor, sources: Tensor, destinations: Tensor, merged: int) -> Tensor:
    """Group the tokens: x (B, T, D) -> (B, T), the group of each token, from 0 to T - merged - 1.

    The `merged` sources most similar to a destination join its group, the first of equally similar ones; each of the
    rest is a group of its own.
    """
    found = [most_similar(row, sources, destinations) for row in x]
    similarity, nearest = (torch.stack(values) for values in zip(*found, strict=True))  # (B, S) each
    rank = similarity.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    leaves = rank < merged
    own = len(destinations) - 1 + (~leaves).cumsum(dim=-1)
    groups = nearest.new_empty(x.shape[:2])
    groups[:, destinations] = torch.arange(len(destinations), dtype=torch.int64, device=x.device)
    groups[:, sources] = torch.where(leaves, nearest, own)
    return groups


def most_similar(tokens: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """tokens (T, D) -> (S,) twice: the cosine between each source and its most similar destination, and which that is.

    In float32, since half precision cannot distinguish similar tokens; row by row and in parts, so that neither memory
    nor the order of sums depends on the size of the batch.
    """
    directions = F.normalize(tokens.float(), dim=-1)
    towards = directions[destinations].T
    parts = directions[sources].split(max(1, ROOM // len(destinations)))
    values, numbers = zip(*((part @ towards).max(dim=-1) for part in parts), strict=True)
    return torch.cat(values), torch.cat(numbers)


def merge(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """The mean of each group: x (B, T, D), groups (B, T) -> (B, M, D) for M = count groups, none of them empty.

    Unlike scattered sums, those of an embedding bag always have the same order on a GPU.
    """
    flat = unique_groups(groups, count)
    members = flat.argsort(stable=True)
    firsts = torch.searchsorted(flat[members], torch.arange(len(x) * count, dtype=torch.int64, device=x.device))
    return F.embedding_bag(members, x.flatten(0, 1), firsts, mode="mean").unflatten(0, (len(x), count))


def unmerge(merged: Tensor, groups: Tensor) -> Tensor:
    """Each token gets its group's value: merged (B, M, D), groups (B, T) -> (B, T, D)"""
    flat = unique_groups(groups, merged.shape[1])
    return merged.flatten(0, 1)[flat].unflatten(0, groups.shape)


def unique_groups(groups: Tensor, count: int) -> Tensor:
    """Number groups across rows: (B, T), each row with numbers below count -> (B * T,)."""
    return (groups + count * torch.arange(len(groups), dtype=torch.int64, device=groups.device)[:, None]).flatten()
