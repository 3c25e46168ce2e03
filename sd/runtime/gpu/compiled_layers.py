"""Convolutions of a compiled network that are computed otherwise than by PyTorch's own function.

To the compiler they are an operator that it calls and does not look into. Packed weights have no address and no
strides, which a program's inputs need; so the program passes on the number of the layer, and the function for it lies
at hand meanwhile. As it is looked up in each call, weights that were packed anew are used at once.

B batch, C channels, H W height and width.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.unet import UNet, Upsample
from sd.runtime.cpu.operators import Operator
from sd.runtime.cpu.upsampling import doubles

Forwards = Mapping[nn.Module, Callable[..., Tensor]]
_at_hand = threading.local()  # functions: by number, as long as `at_hand` lasts


def layers_of(network: UNet) -> list[nn.Module]:
    """Those that may be computed otherwise; where one stands is its number."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | Upsample)]


@contextmanager
def at_hand(network: UNet, forwards: Forwards) -> Iterator[None]:
    """As long as it lasts, programs of this thread find these forward functions of layers of the network."""
    before = getattr(_at_hand, "functions", {})
    layers = enumerate(layers_of(network))
    _at_hand.functions = {number: forwards[layer] for number, layer in layers if layer in forwards}
    try:
        yield
    finally:
        _at_hand.functions = before


def calling(network: UNet, forwards: Forwards) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forward functions that call the operator, for the layers that have one among the given ones."""
    numbered = [(number, layer) for number, layer in enumerate(layers_of(network)) if layer in forwards]
    return {
        layer: _upsampling(layer, number) if isinstance(layer, Upsample) else _calling(layer, number)
        for number, layer in numbered
    }


def _calling(conv: nn.Conv2d, number: int, scale: int = 1) -> Callable[[Tensor], Tensor]:
    operator = OPERATOR.call
    options = conv.stride, conv.padding, conv.dilation, conv.groups, scale, number
    return lambda x: operator(x, conv.weight, conv.bias, *options)


def _upsampling(layer: Upsample, number: int) -> Callable[[Tensor, torch.Size], Tensor]:
    doubled = _calling(layer.conv, number, scale=2)

    def forward(x: Tensor, size: torch.Size) -> Tensor:
        """`Upsample.forward`"""
        if doubles(x, size):
            return doubled(x)
        return layer.conv(F.interpolate(x, size=size, mode="nearest"))

    return forward


def _layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: int,
    number: int,
) -> Tensor:
    """(B, C, H, W) -> (B, out channels, H', W') in channels_last order; by the plain weight where none is at hand.

    scale  by how much x is upsampled before
    """
    function = getattr(_at_hand, "functions", {}).get(number)
    if function is None:
        result = F.conv2d(_upsampled(x, scale), weight, bias, stride, padding, dilation, groups)
    elif scale > 1:
        result = function(x, torch.Size([scale * side for side in x.shape[2:]]))
    else:
        result = function(x)
    return result.contiguous(memory_format=torch.channels_last)


def _shape(x, weight, bias, stride, padding, dilation, groups, scale, number) -> Tensor:
    """What the compiler knows of the result."""
    result = F.conv2d(_upsampled(x, scale), weight, bias, stride, padding, dilation, groups)
    return result.contiguous(memory_format=torch.channels_last)


def _upsampled(x: Tensor, scale: int) -> Tensor:
    return x if scale == 1 else F.interpolate(x, scale_factor=float(scale), mode="nearest")


OPERATOR = Operator(
    "layer(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int scale, "
    "int number) -> Tensor",
    _layer,
    _shape,
)
