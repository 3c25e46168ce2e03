"""Convolutions with packed weights inside of a compiled program.

To the compiler they are an operator that it calls and does not look into. Packed weights have no address and no
strides, which a program's inputs need; so the program passes on the number of the convolution, and what was packed lies
at hand meanwhile. As it is looked up in each call, weights that were packed anew are used at once.

C channels, H W height and width.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.running.packing import CONVOLUTION, PackedConvolutions

SCHEMA = (
    "packed_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, int number) -> Tensor"
)
_at_hand = threading.local()  # weights: by number, as long as `packed_at_hand` lasts


@contextmanager
def packed_at_hand(packed: PackedConvolutions) -> Iterator[None]:
    """As long as it lasts, programs of this thread find these weights."""
    weights = packed.weights()
    before = getattr(_at_hand, "weights", {})
    _at_hand.weights = {number: weights[conv] for number, conv in enumerate(packed.convolutions) if conv in weights}
    try:
        yield
    finally:
        _at_hand.weights = before


def calling_packed(packed: PackedConvolutions) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Forward functions for the convolutions that have a packed weight now."""
    weights = packed.weights()
    return {conv: _calling(conv, number) for number, conv in enumerate(packed.convolutions) if conv in weights}


def _calling(conv: nn.Conv2d, number: int) -> Callable[[Tensor], Tensor]:
    _, operator = _registered()
    options = conv.stride, conv.padding, conv.dilation, conv.groups, number
    return lambda x: operator(x, conv.weight, conv.bias, *options)


@functools.cache
def _registered() -> tuple[torch.library.Library, Callable[..., Tensor]]:
    """The operator, and what it ends with."""
    library = torch.library.Library("sd_zoo", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("packed_convolution", _convolve, "CPU")
    torch.library.register_fake("sd_zoo::packed_convolution", _shape, lib=library)
    return library, torch.ops.sd_zoo.packed_convolution.default


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    number: int,
) -> Tensor:
    """(B, C, H, W) -> (B, out channels, H', W') in channels_last order; by the plain weight where none is packed."""
    packed = getattr(_at_hand, "weights", {}).get(number)
    if packed is None:
        result = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    else:
        result = CONVOLUTION(x, packed, bias, padding, stride, dilation, groups, "none", [], "")
    return result.contiguous(memory_format=torch.channels_last)


def _shape(x, weight, bias, stride, padding, dilation, groups, number) -> Tensor:
    """What the compiler knows of the result."""
    result = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return result.contiguous(memory_format=torch.channels_last)
