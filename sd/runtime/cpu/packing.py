"""Convolution weights laid out once as the CPU wants them, instead of in every call.

oneDNN, which computes PyTorch's convolutions on CPUs, reads weights in blocks of channels. A network keeps them as they
are in the file, so each call lays them out first. Where feature maps are small, that takes longer than the convolution:
docs/performance.md has the figures.

A packed convolution keeps its weight where the file is mapped, in the file's precision, which takes no memory, and has
a copy in its input's precision and oneDNN's layout beside it. The rest of the network sees an `nn.Conv2d`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CONVOLUTION = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # there are builds of PyTorch without oneDNN
TYPICAL = 32, 32  # feature map; without it, oneDNN's layout makes 1x1 convolutions up to 40 times as slow


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    if CONVOLUTION is None or device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not by processors without AVX-512
    return dtype == torch.float32


class PackedConv2d(nn.Conv2d):
    """A convolution that computes with a packed copy of its weight, without gradients.

    The copy is made again when the weight has changed; changes through `.data` are not seen. Where gradients of the
    weight or the input are needed, and where packed weights cannot be used, the weight itself is.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out channels, H', W')"""
        if self.weight.requires_grad or x.requires_grad or not can_pack(x.device, x.dtype):
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias)
        options = self.bias, self.padding, self.stride, self.dilation, self.groups
        return CONVOLUTION(x, self._packed_weight(x.dtype), *options, "none", [], "")  # no other function joined to it

    def _packed_weight(self, dtype: torch.dtype) -> Tensor:
        made = vars(self).get("_packed")
        if not is_made_from(made, self, dtype):
            self._packed = *origin(self), dtype, pack(self, self.weight.detach().to(dtype))
        return self._packed[-1]

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_packed"}  # copies make their own


def make_packed(packed: Mapping[nn.Conv2d, Tensor], dtype: torch.dtype) -> None:
    """Have convolutions compute with these packed weights, which are in that precision, from now on."""
    for conv, weight in packed.items():
        conv.__class__ = PackedConv2d
        conv._packed = *origin(conv), dtype, weight


def convolutions_of(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def origin(conv: nn.Conv2d) -> tuple[Tensor, int]:
    """The weight, and its version, which changes with changes in place."""
    weight = conv.weight.detach()
    return weight, 0 if weight.is_inference() else weight._version


def is_made_from(made: tuple | None, conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Whether something, which begins with the weight, its version and a dtype, was made from what these are now."""
    weight, version = origin(conv)
    return made is not None and (made[0].data_ptr(), *made[1:3]) == (weight.data_ptr(), version, dtype)


@torch.no_grad()
def pack(conv: nn.Conv2d, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A weight, in this precision or its own, in oneDNN's layout for this convolution, which only oneDNN can read."""
    weight = weight.to(dtype or weight.dtype)
    options = conv.padding, conv.stride, conv.dilation, conv.groups
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *options, [2, conv.in_channels, *TYPICAL])
