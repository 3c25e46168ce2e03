"""Heat maps: which words each position of the picture attends to, from the UNet's cross-attention.

The network computes its attention as always. The fused operation does not return the weights, so hooks keep its queries
and keys, and the weights are computed from them a second time.

T positions of a feature map (h * w), S tokens of the context, D width, K columns: the tokens, with padding as one.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.config import UNetConfig
from sd.networks.attention import SpatialTransformer
from sd.networks.block_plan import block_plan

SIDES = ((32, True), (16, True), (32, False), (16, False), (8, False))  # largest map side, and whether heads are apart
ROOM = 2_400_000  # most numbers in the maps of one run


def attention_weights(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """How much each position attends to each token; the weights of a position sum to 1.

    q        (T, D)  queries, of all heads side by side
    k        (S, D)  keys
    returns  (heads, T, S) float32

    Vaswani et al., "Attention Is All You Need" (2017), the softmax of eq. 1.
    """
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))  # -> (heads, T or S, D/heads)
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Heat:
    """What the layers of one resolution attend to in one step: the mean of these layers."""

    height: int  # of their feature maps
    width: int
    layers: int  # their number
    weights: Tensor  # (heads, K, h, w) float32 on the CPU; they sum to 1 over the columns at each position


def map_side(config: UNetConfig, size: tuple[int, int], columns: int, steps: int) -> tuple[int, bool]:
    """The largest side of maps, and whether each head has its own, so that the maps of a run fit into `ROOM`.

    size  height and width of the latents
    """
    # in a block that ends in an upsampling, attention comes before it: its map is smaller than the output
    levels = {(row.scale * (1 + ("upsample" in row.layers)), row.heads) for row in block_plan(config) if row.heads}
    for side, apart in SIDES:
        one = sum(
            (heads if apart else 1) * math.prod(min(side, math.ceil(length / scale)) for length in size)
            for scale, heads in levels
        )
        if columns * steps * one <= ROOM:
            break
    return side, apart


class AttentionWatch:
    """Records the cross-attention of chosen predictions.

    If a prediction skips layers and reuses their features (`sd.runtime.shortcuts.feature_reuse`), these layers keep the
    maps of the last recorded prediction that ran them.

    unet         the network to record, inside the `with` block
    side         larger maps are shrunk to this side: means over neighbouring positions
    heads_apart  whether each head has its own maps, or only the mean of all heads is kept

        with AttentionWatch(unet).watching() as watch:
            watch.expect(column_of)
            unet(x_t, timestep, context)
            heats = watch.take()
    """

    def __init__(self, unet: nn.Module, *, side: int = 32, heads_apart: bool = True):
        self.unet, self.side, self.heads_apart = unet, side, heads_apart
        self._membership: Tensor | None = None
        self._maps: dict[nn.Module, tuple[torch.Size, Tensor]] = {}  # by layer: the size of its feature map, its maps

    def expect(self, column_of: Sequence[int]) -> None:
        """Record the next prediction. column_of: for each of the S tokens, the column it belongs to."""
        columns = torch.tensor(column_of, dtype=torch.int64, device="cpu")
        self._membership = F.one_hot(columns, int(columns.max()) + 1).float()  # (S, K)

    def take(self) -> list[Heat]:
        """Stop recording and return the maps, the largest first."""
        self._membership = None
        alike: dict[tuple[int, int, int], list[Tensor]] = {}  # by height, width, heads
        for size, maps in self._maps.values():
            alike.setdefault((*size, len(maps)), []).append(maps)
        return [
            Heat(height=h, width=w, layers=len(maps), weights=(sum(maps) / len(maps)).cpu())
            for (h, w, _), maps in sorted(alike.items(), key=lambda item: -item[0][0] * item[0][1])
        ]

    @contextmanager
    def watching(self):
        with ExitStack() as stack:
            for transformer in self.unet.modules():
                if isinstance(transformer, SpatialTransformer):
                    for handle in self._hooks(transformer):
                        stack.callback(handle.remove)
            yield self

    def _hooks(self, transformer: SpatialTransformer):
        """Hooks for one transformer: on the size of its feature map, and on the queries and keys of its blocks."""
        seen: dict[str, Tensor | torch.Size] = {}

        def note_size(_, arguments):
            seen["size"] = arguments[0].shape[-2:]

        def note(name: str):
            def hook(_, __, output):
                if self._membership is not None:
                    seen[name] = output[-1]  # with guidance, the negative prompt comes first

            return hook

        def add(attention, *_):
            if self._membership is not None:
                weights = attention_weights(seen.pop("q"), seen.pop("k"), attention.heads)
                self._maps[attention] = seen["size"], self._columns(weights, seen["size"])

        yield transformer.register_forward_pre_hook(note_size)
        for block in transformer.blocks:
            yield block.cross_attention.q.register_forward_hook(note("q"))
            yield block.cross_attention.k.register_forward_hook(note("k"))
            yield block.cross_attention.register_forward_hook(add)

    def _columns(self, weights: Tensor, size: torch.Size) -> Tensor:
        """(heads, T, S) -> (heads, K, h, w)"""
        maps = (weights @ self._membership.to(weights.device)).transpose(1, 2).unflatten(-1, tuple(size))
        if not self.heads_apart:
            maps = maps.mean(dim=0, keepdim=True)
        return F.adaptive_avg_pool2d(maps, tuple(min(self.side, length) for length in size))
