"""Upsampling and the 3x3 convolution behind it, as four 2x2 convolutions of what is upsampled.

Nearest-neighbour upsampling repeats each position 2x2 times, so a window of 3x3 positions behind it sees 2x2 different
ones. Which these are, and which of the nine weights each of them is multiplied with, depends on whether the window's
row and column are even or odd. So there are four sets of 2x2 weights, sums of the nine, one for each quarter of the
result: 4 instead of 9 multiplications for each number, and the large feature map is never there (Aitken et al.,
"Checkerboard artifact free sub-pixel convolution", 2017, has the equivalence). On CPUs only: on GPUs, 2x2 convolutions
are not the ones that libraries are made for. As elsewhere, the networks do not know.

B batch, C channels, H W height and width.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from sd.networks import unet, vae
from sd.runtime.cpu.packing import CONVOLUTION, can_pack, is_made_from, origin, pack, plain_weight

POSITIONS = 256  # of what is upsampled; for fewer, four calls and the margins take what is saved
Phase = tuple[int, int]  # row and column of the window's middle, 0 even and 1 odd


class UpsampledConvolutions:
    """The 2x2 weights of a network's convolutions behind upsampling: in memory, 16/9 of the 3x3 ones.

    They are made when they are first needed, and again when the network's have changed; changes through `.data` are not
    seen.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.layers = upsampling_layers(network)
        self._made: dict[nn.Module, tuple[Tensor, int, dict[Phase, Tensor]]] = {}

    def forwards(self, x: Tensor) -> dict[nn.Module, Callable[..., Tensor]]:
        """Forward functions for these layers and inputs like x, without gradients; none where they cannot be used."""
        if not can_pack(x.device, x.dtype) or torch.is_grad_enabled():
            return {}
        return {layer: self._forward(layer) for layer in self.layers}

    def _forward(self, layer: nn.Module) -> Callable[..., Tensor]:
        plain = layer.forward

        def forward(x: Tensor, size: torch.Size | None = None) -> Tensor:
            """(B, C, H, W) -> (B, C, 2H, 2W); `size` as in `sd.networks.unet.Upsample`"""
            if x.shape[-2:].numel() < POSITIONS or not doubles(x, size):
                return plain(x) if size is None else plain(x, size)
            return convolve_upsampled(x, self._phases(layer), layer.conv.bias)

        return forward

    def _phases(self, layer: nn.Module) -> dict[Phase, Tensor]:
        if not is_made_from(self._made.get(layer), layer.conv):
            weights = phase_weights(plain_weight(layer.conv))
            packed = {phase: pack(layer.conv, each) for phase, each in weights.items()}
            self._made[layer] = *origin(layer.conv), packed
        return self._made[layer][2]


def upsampling_layers(network: nn.Module) -> list[nn.Module]:
    """Those that upsample before a convolution, `conv`."""
    return [module for module in network.modules() if isinstance(module, unet.Upsample | vae.Upsample)]


def doubles(x: Tensor, size: torch.Size | None) -> bool:
    """Whether a size that is asked for, if one is, is twice that of x (B, C, H, W)."""
    return size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])


@torch.no_grad()
def phase_weights(weight: Tensor) -> dict[Phase, Tensor]:
    """3x3 weights (C', C, 3, 3) -> for each phase (C', C, 2, 2).

    An even row 2i sees the rows 2i - 1, 2i and 2i + 1, which repeat i - 1, i and i; an odd one i, i and i + 1.
    """

    def sums(weight: Tensor, dim: int, phase: int) -> Tensor:
        first, middle, last = weight.unbind(dim)
        return torch.stack([first + middle, last] if phase else [first, middle + last], dim)

    exact = weight.float()
    return {
        (row, column): sums(sums(exact, 2, row), 3, column).to(weight.dtype)
        for row, column in product((0, 1), repeat=2)
    }


def convolve_upsampled(x: Tensor, phases: dict[Phase, Tensor], bias: Tensor) -> Tensor:
    """x (B, C, H, W), packed 2x2 weights -> (B, C', 2H, 2W) in channels_last order.

    With a margin of one position, a 2x2 convolution has H + 1 rows of results, the first of which sees no row before
    the first: these, without the last, are for even rows, and without the first for odd ones.
    """
    batch, _, height, width = x.shape
    result = x.new_empty(batch, 2 * height, 2 * width, len(bias)).permute(0, 3, 1, 2)
    for (row, column), weight in phases.items():
        found = CONVOLUTION(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "")
        result[:, :, row::2, column::2] = found[:, :, row : row + height, column : column + width]
    return result
