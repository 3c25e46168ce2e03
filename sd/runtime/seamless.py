"""Seamlessly tiling pictures, by circular padding.

Every convolution pads its input with zeros. With the opposite edge there instead, the networks cannot tell where the
picture ends, as everything else in them treats all positions alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.vae import Downsample
from sd.runtime.patching import patched


def pad(x: Tensor, left: int, right: int, top: int, bottom: int, axes: str) -> Tensor:
    """(B, C, H, W) -> (B, C, top + H + bottom, left + W + right): circular along these axes, zeros along others.

    axes  any of "x" (to the left and right) and "y" (above and below)
    """
    x = F.pad(x, (left, right, 0, 0), mode="circular" if "x" in axes else "constant")
    return F.pad(x, (0, 0, top, bottom), mode="circular" if "y" in axes else "constant")


def seamless(network: nn.Module, axes: str) -> AbstractContextManager[None]:
    """Within this context, a network's convolutions have circular padding along these axes, if any."""
    return patched(circular(network, axes))


def circular(network: nn.Module, axes: str) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Forward functions with circular padding, for each module that pads."""
    forwards = {}
    for module in network.modules() if axes else ():
        if isinstance(module, Downsample):  # pads by itself: right and bottom only
            forwards[module] = _downsampling(module, axes)
        elif isinstance(module, nn.Conv2d) and any(module.padding):
            forwards[module] = _convolution(module, axes)
    return forwards


def _convolution(conv: nn.Conv2d, axes: str) -> Callable[[Tensor], Tensor]:
    height, width = conv.padding

    def forward(x: Tensor) -> Tensor:
        return F.conv2d(pad(x, width, width, height, height, axes), conv.weight.to(x.dtype), conv.bias, conv.stride)

    return forward


def _downsampling(module: Downsample, axes: str) -> Callable[[Tensor], Tensor]:
    return lambda x: module.conv(pad(x, 0, 1, 0, 1, axes))
