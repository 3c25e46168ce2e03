"""What the inner blocks of the UNet find changes slowly from step to step, so some predictions can take over the last.

At every N-th prediction the whole network runs, and what its inner blocks give to the outer output blocks is kept. In
between, only the outer blocks run, on the noisy latents and the timestep of the moment, with what was kept in place of
the inner blocks: Ma, Fang & Wang, "DeepCache: Accelerating Diffusion Models for Free" (2024), section 3.3; the same
for single blocks is Wimbauer et al., "Cache Me if You Can" (2024). This changes the picture.

As elsewhere in this folder, the UNet does not know: forward functions of its blocks are others for a while.

B rows of the context, that is, two for each picture with guidance; C channels, H W height and width of the latents.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from sd.networks.unet import UNet
from sd.runtime.patching import patched

OUTER = 1  # input blocks, and as many output blocks, that run at every prediction; docs/performance.md says why


class ReusedFeatures:
    """What one run of a sampler keeps from prediction to prediction. It belongs to that run: each has one of its own.

    every  N: the inner blocks run at the first of every N predictions; 1 is always
    outer  how many input blocks, and as many output blocks, are not inner ones
    """

    def __init__(self, every: int, outer: int = OUTER):
        self.every, self.outer = every, outer
        self.forget()

    def forget(self) -> None:
        """Have the whole network run next, since what was kept is about something else, such as other words."""
        self._kept: dict[int, Tensor] = {}
        self._predictions = 0  # with what is kept, the one that it is from included
        self._kind: tuple | None = None
        self._context: Tensor | None = None

    def begin(self, x: Tensor, context: Tensor) -> None:
        """A prediction for x (B, C, H, W) is next. With another size, number of rows or context, it starts anew.

        context  a context is another one if it has memory of its own; a view of the same is the same
        """
        kind = x.shape, x.dtype, x.device
        same = self._context is not None and shares_memory(context, self._context)
        if kind != self._kind or not same or self._predictions == self.every:
            self.forget()
            self._kind, self._context = kind, context  # which is held, so that no other can take its place
        self._predictions += 1

    def applied(self, unet: UNet, part: int = 0) -> AbstractContextManager[None]:
        """As long as it lasts, the network either runs whole, and what its inner blocks give is kept, or without them.

        part  which part of the prediction's rows is asked for, where they are not all together
        """
        *inner, last = inner_blocks(unet, self.outer)
        if part not in self._kept:
            return patched({last: self._keeping(last.forward, part)})
        return patched({**dict.fromkeys(inner, nothing), last: lambda *_, **__: self._kept[part]})

    def _keeping(self, forward: Callable[..., Tensor], part: int) -> Callable[..., Tensor]:
        def keeping(x: Tensor, time: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
            self._kept[part] = forward(x, time, context, size)
            return self._kept[part]

        return keeping


def shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def inner_blocks(unet: UNet, outer: int) -> list[nn.Module]:
    """The blocks that are left out, in the order in which they run; the last one gives what is kept."""
    ends = len(unet.output_blocks) - outer
    return [*unet.input_blocks[outer:], unet.middle_block, *unet.output_blocks[:ends]]


def nothing(x: Tensor, time: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
    """(B, 0, H, W): no channels, which can be joined with others of that kind and are handed on to the last block."""
    return x.new_empty(len(context), 0, *x.shape[-2:])
