"""Convolution weights laid out once as the CPU wants them, instead of anew in every call.

oneDNN, which computes PyTorch's convolutions on CPUs, reads weights in blocks of channels. A network keeps them as they
are in the file, so each call re-lays them first. Where feature maps are small, that takes longer than the convolution:
docs/performance.md has the figures. The network itself is not changed: its forwards are patched while it runs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

CONVOLUTION = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # there are builds of PyTorch without oneDNN
TYPICAL = 32, 32  # feature map; told nothing, oneDNN takes a layout that makes 1x1 convolutions up to 40 times as slow


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed weights pay on this device and in this precision.

    In float32 the plain weights stay in the mapped file, so packed ones take the memory that others would. In bf16 they
    come on top, for the convolutions that Winograd's algorithm does not compute.
    """
    if CONVOLUTION is None or device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not by processors without AVX-512
    return dtype == torch.float32


class PackedConvolutions:
    """The packed weights of a network's convolutions.

    Each is made when its convolution first runs, and again when the network's weight has changed; changes through
    `.data` are not seen. A network in training uses its own weights.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        self._packed: dict[nn.Conv2d, tuple[Tensor, int, Tensor]] = {}  # made from what, in which version; the result

    def forwards(self) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """Forward functions, without gradients, for the convolutions that can use them now."""
        forwards = {}
        for conv in self.convolutions:
            if can_pack(conv.weight.device, conv.weight.dtype) and not conv.weight.requires_grad:
                forwards[conv] = partial(self._forward, conv)
            else:
                self._packed.pop(conv, None)  # an optimiser may change weights without a trace
        return forwards

    def _forward(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if not is_made_from(self._packed.get(conv), conv):
            weight, version = origin(conv)
            self._packed[conv] = weight, version, pack(conv, weight)
        return convolve(conv, self._packed[conv][2], x)


def origin(conv: nn.Conv2d) -> tuple[Tensor, int]:
    """The weight, and a number that changes when it is changed in place."""
    weight = conv.weight.detach()
    return weight, 0 if weight.is_inference() else weight._version


def is_made_from(made: tuple | None, conv: nn.Conv2d) -> bool:
    """Whether something that begins with the weight and the number of `origin` was made from what these are now."""
    weight, version = origin(conv)
    return made is not None and (made[0].data_ptr(), made[1]) == (weight.data_ptr(), version)


@torch.no_grad()
def pack(conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """A weight in oneDNN's own layout for this convolution, which only `convolve` can read."""
    options = conv.padding, conv.stride, conv.dilation, conv.groups
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *options, [2, conv.in_channels, *TYPICAL])


def convolve(conv: nn.Conv2d, packed: Tensor, x: Tensor) -> Tensor:
    """What the convolution makes of x (B, C, H, W), up to rounding."""
    options = conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    return CONVOLUTION(x, packed, *options, "none", [], "")  # no other function joined to it
