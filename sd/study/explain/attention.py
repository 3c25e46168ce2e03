"""Which words each place of the picture looks at: the weights of the UNet's cross-attention, watched from outside.

The network computes its attention as always. Hooks keep the queries and keys that it used, and the weights, which the
fused attention never shows, are computed from them a second time.

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

SIDES = ((32, True), (16, True), (32, False), (16, False), (8, False))  # largest map kept, and whether heads are apart
ROOM = 2_400_000  # numbers that the maps of one run may have


def attention_weights(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """How much each position takes from each token; what a position takes from all tokens sums to 1.

    q        (T, D)  queries, of all heads side by side
    k        (S, D)  keys
    returns  (heads, T, S) float32

    Vaswani et al., "Attention Is All You Need" (2017), the softmax of eq. 1.
    """
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))  # -> (heads, T or S, D/heads)
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Heat:
    """What the layers of one resolution looked at in one step: the mean of these layers."""

    height: int  # of their feature maps
    width: int
    layers: int  # how many there are
    weights: Tensor  # (heads, K, h, w) float32 on the CPU; over the columns they sum to 1 at each place


def map_side(config: UNetConfig, size: tuple[int, int], columns: int, steps: int) -> tuple[int, bool]:
    """How large maps may be, and whether each head gets its own, for the maps of a run to stay within `ROOM`.

    size  height and width of the latents
    """
    # a block that ends in an upsampling has its attention before it, and so a smaller map than its output
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
    """Keeps the cross-attention of the predictions that it is asked to keep.

    Where a prediction goes without some layers and takes what they found before (`sd.runtime.shortcuts.feature_reuse`),
    these keep the maps that they had when they ran, as long as that was watched, too.

    unet        whose attention is watched between `with` and its end
    side        maps with longer sides are made smaller: means over neighbouring places
    heads_apart whether each head has its own maps, or the mean of all heads is kept

        with AttentionWatch(unet).watching() as watch:
            watch.expect(column_of)
            unet(x_t, timestep, context)
            heats = watch.take()
    """

    def __init__(self, unet: nn.Module, *, side: int = 32, heads_apart: bool = True):
        self.unet, self.side, self.heads_apart = unet, side, heads_apart
        self._membership: Tensor | None = None
        self._maps: dict[nn.Module, tuple[torch.Size, Tensor]] = {}  # of each layer: size of its feature map, its maps

    def expect(self, column_of: Sequence[int]) -> None:
        """Keep the next prediction. column_of says for each of the S tokens which column it belongs to."""
        columns = torch.tensor(column_of)
        self._membership = F.one_hot(columns, int(columns.max()) + 1).float()  # (S, K)

    def take(self) -> list[Heat]:
        """What was kept, the largest maps first. Until the next `expect`, nothing more is."""
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
        """The hooks of one transformer: the size of its feature map, then queries, keys and weights of its blocks."""
        seen: dict[str, Tensor | torch.Size] = {}

        def note_size(_, arguments):
            seen["size"] = arguments[0].shape[-2:]

        def note(name: str):
            def hook(_, __, output):
                if self._membership is not None:
                    seen[name] = output[-1]  # with guidance, the negative prompt stands first

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
