"""Weights of convolutions laid out once as the CPU wants them, instead of anew in every call.

oneDNN, which computes PyTorch's convolutions on CPUs, reads weights in blocks of channels. A network keeps them as they
are in the file, so each call re-lays them first. Where feature maps are small, that takes longer than the convolution:
docs/performance.md has the figures. As in `sd.runtime.seamless`, the network does not know.

A network may have its convolutions' weights in that layout alone: then the plain ones, of which each has a packed one,
are on the meta device, without memory. `make_whole` brings them back, to the bit.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

CONVOLUTION = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # there are builds of PyTorch without oneDNN
TYPICAL = 32, 32  # feature map; told nothing, oneDNN takes a layout that makes 1x1 convolutions up to 40 times as slow


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    if CONVOLUTION is None or device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not by processors without AVX-512
    return dtype == torch.float32


class PackedConvolutions:
    """The packed weights of a network's convolutions, in as much memory again as these take.

    They are made when they are first needed, and again when the network's have changed; changes through `.data` are not
    seen. A network in training uses its own.

    ready  those that were made while the network was loaded, by the names of the weights
    """

    def __init__(self, network: nn.Module, ready: Mapping[str, Tensor] | None = None):
        self.network = network
        convolutions = convolutions_of(network)
        self.convolutions = list(convolutions.values())
        self._packed: dict[nn.Conv2d, tuple[Tensor, int, Tensor]] = {}  # made from what, in which version; the result
        for name, packed in (ready or {}).items():
            conv = convolutions[name]
            self._packed[conv] = *origin(conv), packed
            if conv.weight.is_meta:
                conv.only_packed = packed

    def forwards(self) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """Forward functions, without gradients, for the convolutions that can use them now."""
        return {conv: partial(convolve, conv, packed) for conv, packed in self.weights().items()}

    def weights(self) -> dict[nn.Conv2d, Tensor]:
        """The packed weight of every convolution that can use one now."""
        dtypes = {conv.weight.dtype for conv in self.convolutions if only_packed(conv) is not None}
        if not all(can_pack(torch.device("cpu"), dtype) for dtype in dtypes):
            make_whole(self.network)
        for conv in self.convolutions:
            if (packed := only_packed(conv)) is not None:
                self._packed[conv] = conv.weight, 0, packed
                continue
            if can_pack(conv.weight.device, conv.weight.dtype) and not conv.weight.requires_grad:
                self._renew(conv)
            else:
                self._packed.pop(conv, None)
        return {conv: packed for conv, (_, _, packed) in self._packed.items()}

    def _renew(self, conv: nn.Conv2d) -> None:
        if not is_made_from(self._packed.get(conv), conv):
            weight, version = origin(conv)
            self._packed[conv] = weight, version, pack(conv, weight)


def convolutions_of(network: nn.Module) -> dict[str, nn.Conv2d]:
    """By the names of their weights."""
    return {f"{name}.weight": module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def only_packed(conv: nn.Conv2d) -> Tensor | None:
    """The packed weight of a convolution that has no other."""
    return vars(conv).get("only_packed")


def plain_weight(conv: nn.Conv2d) -> Tensor:
    """As it was before it was packed; where it is packed only, a new copy."""
    packed = only_packed(conv)
    return conv.weight.detach() if packed is None else packed.to_dense()


@torch.no_grad()
def make_whole(network: nn.Module) -> None:
    """Give every convolution its plain weight, in as much memory again, where it has a packed one only."""
    for conv in convolutions_of(network).values():
        if only_packed(conv) is not None:
            conv.weight = nn.Parameter(plain_weight(conv), requires_grad=conv.weight.requires_grad)
            del conv.only_packed


class WholeNetwork:
    """A field that holds a network, which is whole as soon as somebody asks for it.

    What runs the network by packed weights takes it from the field's own place, the name with an underscore before it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}"

    def __get__(self, holder: object, owner: type) -> nn.Module:
        if holder is None:
            raise AttributeError(self.place[1:])  # to a dataclass: there is no default
        network = vars(holder)[self.place]
        make_whole(network)
        return network

    def __set__(self, holder: object, network: nn.Module) -> None:
        vars(holder)[self.place] = network


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
