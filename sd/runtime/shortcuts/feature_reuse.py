"""Feature reuse: the inner blocks of the UNet run at every N-th prediction only.

Their output changes slowly from step to step. Every N-th prediction runs the whole network and keeps what the inner
blocks give to the outer output blocks. The others run the outer blocks alone, on the current latents and timestep, with
the kept features: Ma, Fang & Wang, "DeepCache: Accelerating Diffusion Models for Free" (2024), section 3.3; Wimbauer et
al., "Cache Me if You Can" (2024), do so for single blocks. This changes the picture.

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
    """The features that one run of a sampler keeps from prediction to prediction.

    every  N: the inner blocks run at the first of every N predictions
    outer  the number of input blocks, and of output blocks, that run at every prediction
    """

    def __init__(self, every: int, outer: int = OUTER):
        self.every, self.outer = every, outer
        self.forget()

    def forget(self) -> None:
        """Drop the features, so that the whole network runs next."""
        self._kept: dict[int, Tensor] = {}
        self._predictions = 0  # since the whole network ran, that one included
        self._kind: tuple | None = None
        self._context: Tensor | None = None

    def begin(self, x: Tensor, context: Tensor) -> None:
        """Prepare for a prediction for x (B, C, H, W). With another size, batch or context, the whole network runs.

        context  views of the same memory count as the same context
        """
        kind = x.shape, x.dtype, x.device
        same = self._context is not None and (
            context.untyped_storage().data_ptr() == self._context.untyped_storage().data_ptr()
        )
        if kind != self._kind or not same or self._predictions == self.every:
            self.forget()
            self._kind, self._context = kind, context  # kept alive, so that no other gets its address
        self._predictions += 1

    def applied(self, unet: UNet, part: int = 0) -> AbstractContextManager[None]:
        """Within this context, the network runs whole and its inner features are kept, or it runs with kept ones.

        part  number of the part, if the rows of the prediction are not computed together
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


def inner_blocks(unet: UNet, outer: int) -> list[nn.Module]:
    """The blocks that are left out, in the order in which they run; the output of the last one is kept."""
    ends = len(unet.output_blocks) - outer
    return [*unet.input_blocks[outer:], unet.middle_block, *unet.output_blocks[:ends]]


def nothing(x: Tensor, time: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
    """(B, 0, H, W): no channels, as the output of blocks that are left out."""
    return x.new_empty(len(context), 0, *x.shape[-2:])
