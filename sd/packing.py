"""Weights of convolutions laid out once as the CPU wants them, instead of anew in every call.

oneDNN, which computes PyTorch's convolutions on CPUs, reads weights in blocks of channels. A network keeps them as they
are in the file, so each call re-lays them first. Where feature maps are small, that takes longer than the convolution:
docs/performance.md has the figures. As in `sd.tiling`, the network does not know.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from sd.exchange import exchanged

PACKABLE = (torch.float32, torch.bfloat16)  # what oneDNN computes in wherever it computes at all
CONVOLUTION = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # there are builds of PyTorch without oneDNN


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    return CONVOLUTION is not None and device.type == "cpu" and dtype in PACKABLE and torch.backends.mkldnn.enabled


class PackedConvolutions:
    """The packed weights of a network's convolutions, in as much memory again as these take.

    They are made when they are first needed, and again when the network's have changed.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        self._packed: dict[nn.Conv2d, tuple[Tensor, int, Tensor]] = {}  # what it was made from, in which version

    def applied(self) -> AbstractContextManager[None]:
        """As long as it lasts, the network uses them, without gradients; where it cannot, nothing changes."""
        usable = (conv for conv in self.convolutions if can_pack(conv.weight.device, conv.weight.dtype))
        return exchanged({conv: self._forward(conv) for conv in usable})

    def _forward(self, conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        weight = conv.weight.detach()
        version = 0 if weight.is_inference() else weight._version
        known = self._packed.get(conv)
        if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != version:
            known = self._packed[conv] = weight, version, pack(conv)
        return partial(convolve, conv, known[2])


@torch.no_grad()
def pack(conv: nn.Conv2d) -> Tensor:
    """The weight in oneDNN's own layout, which only `convolve` can read."""
    weight = conv.weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight, conv.padding, conv.stride, conv.dilation, conv.groups)


def convolve(conv: nn.Conv2d, packed: Tensor, x: Tensor) -> Tensor:
    """What the convolution makes of x (B, C, H, W), up to rounding."""
    options = conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    return CONVOLUTION(x, packed, *options, "none", [], "")  # no other function joined to it
