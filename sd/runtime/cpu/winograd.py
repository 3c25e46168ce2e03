"""3x3 convolutions by Winograd's algorithm, with 16 multiplications where the definition has 36.

Four neighbouring results share their inputs: sums and differences of these, multiplied with sums and differences of the
weights that are computed once, give all four with fewer products (Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks", 2016, section 4.1). After nearest-neighbour upsampling some of the differences are zero, and 9
products are left. `winograd.h` is for processors with AVX-512; in bf16, for those with AVX512-BF16 and without AMX,
whose tiles are faster. In float32 the results are the same up to rounding; in bf16, factors are rounded once more.

B batch, C channels, H W height and width.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sd.networks import unet, vae
from sd.runtime.cpu.native import ADDRESS, AVX512, NUMBER, PAIRS, TILES, Kernel, cpu_flags
from sd.runtime.cpu.operators import Operator
from sd.runtime.cpu.packing import is_made_from, origin
from sd.runtime.device import LATENTS

POSITIONS = 1024  # of a result; for fewer, reading the larger weights costs more than is gained
INPUTS, MOST_INPUTS, OUTPUTS = 16, 8192, 64  # numbers of channels: multiples of 16, at most, multiples of 64


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine gains from the algorithm for this device and precision, if there is a compiler."""
    flags = cpu_flags()
    if device.type != "cpu" or not flags >= AVX512:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and PAIRS in flags and not flags >= TILES)


def functions() -> dict[str, tuple[list, type | None]]:
    """The kernel's functions and their types."""
    kinds = ["float", "bf16"] if PAIRS in cpu_flags() else ["float"]
    weights, convolution = [ADDRESS] * 2 + [NUMBER] * 6, [ADDRESS] * 4 + [ctypes.POINTER(NUMBER), ADDRESS, NUMBER]
    return {
        "sd_winograd_memory": ([NUMBER] * 2, NUMBER),
        **{f"sd_winograd_weights_{kind}": (weights, None) for kind in kinds},
        **{f"sd_winograd_{kind}": (convolution, None) for kind in kinds},
    }


KERNEL = Kernel("winograd", features=lambda: AVX512 | ({PAIRS} & cpu_flags()), functions=functions)


class WinogradConvolutions:
    """A network's convolutions by the algorithm, and their transformed weights, made when first needed.

    keep     keep these weights, of 16/9 of the plain ones' size, and make them again after the network's changed;
             changes through `.data` are not noticed. Otherwise they are made in every call, cheap for large maps
    on_kept  called with a convolution whose own weight is not needed until then
    """

    positions = POSITIONS

    def __init__(self, network: nn.Module, *, keep: bool, on_kept: Callable[[nn.Conv2d], object] = lambda conv: None):
        self.network, self.keep, self.on_kept = network, keep, on_kept
        upsampling = upsampling_layers(network)
        upsampled = {layer.conv for layer in upsampling}
        plain = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module not in upsampled]
        self.layers = {layer: layer for layer in plain if fits(layer)}  # and the convolution in each of them
        self.layers |= {layer: layer.conv for layer in upsampling if fits(layer.conv)}
        # made from what, in which version and precision; the weights as `lay_out` returns them
        self._made: dict[nn.Module, tuple] = {}

    def forwards(
        self,
        x: Tensor,
        latents: int,
        on_build: Callable[[], object] = lambda: None,
    ) -> dict[nn.Module, Callable[..., Tensor]]:
        """Forward functions for inputs like x, without gradients; none if the algorithm is not available.

        latents   the number of positions in the latents that belong to x
        on_build  called before the algorithm is compiled, which is done once on a machine
        """
        if latents < LATENTS or not is_supported(x.device, x.dtype) or torch.is_grad_enabled():
            return {}
        if not self.layers or KERNEL.library(on_build) is None:
            return {}
        return {layer: self._forward(layer, layer.forward) for layer in self.layers}

    def forget(self, conv: nn.Module) -> None:
        """Drop the transformed weights of a convolution."""
        for layer, own in self.layers.items():
            if own is conv:
                self._made.pop(layer, None)

    def _forward(self, layer: nn.Module, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        conv, upsampled = self.layers[layer], not is_convolution(layer)

        def forward(x: Tensor, size: torch.Size | None = None) -> Tensor:
            """(B, C, H, W) -> (B, C', H, W), or (B, C', 2H, 2W) after upsampling; `size` as in `Upsample`"""
            if x.shape[-2:].numel() * (4 if upsampled else 1) < self.positions or not doubles(x, size):
                return plain(x) if size is None else plain(x, size)
            return self.compute(x, self._weights(layer), conv.bias, upsampled)

        return forward

    def compute(self, x: Tensor, weights: Tensor, bias: Tensor, upsampled: bool) -> Tensor:
        return OPERATOR.call(x, weights, bias, upsampled)

    def lay_out(self, weight: Tensor, dtype: torch.dtype, upsampled: bool) -> Tensor:
        return lay_out(weight.to(dtype), upsampled=upsampled)

    def _weights(self, layer: nn.Module) -> Tensor:
        conv, made = self.layers[layer], self._made.get(layer)
        dtype = conv.bias.dtype  # the weight may be in the file's
        if not is_made_from(made, conv, dtype):
            made = *origin(conv), dtype, self.lay_out(conv.weight.detach(), dtype, not is_convolution(layer))
            if self.keep:
                self._made[layer] = made
                vars(conv).pop("_packed", None)  # of no use beside these, and made again for smaller feature maps
                self.on_kept(conv)
        return made[3]


def upsampling_layers(network: nn.Module) -> list[nn.Module]:
    """The layers that upsample before a convolution, `conv`."""
    return [module for module in network.modules() if isinstance(module, unet.Upsample | vae.Upsample)]


def doubles(x: Tensor, size: torch.Size | None) -> bool:
    """Whether the size asked for, if any, is twice that of x (B, C, H, W)."""
    return size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def fits(conv: nn.Conv2d) -> bool:
    """Whether the algorithm computes such a convolution."""
    sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return (
        sizes == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        and conv.bias is not None
        and conv.in_channels % INPUTS == 0
        and conv.in_channels <= MOST_INPUTS
        and conv.out_channels % OUTPUTS == 0
    )


def lay_out(weight: Tensor, *, upsampled: bool) -> Tensor:
    """3x3 weights (C', C, 3, 3) -> transformed, (C'/64, 16, C, 64) numbers, upsampled (C'/64, 9, C, 64).

    In bf16, numbers of two input channels are interleaved. Raises RuntimeError if the algorithm is not available.
    """
    outputs, inputs = weight.shape[:2]
    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    result = weight.new_empty(outputs // OUTPUTS, 9 if upsampled else 16, inputs, OUTPUTS)
    strides = weight.stride(1), weight.stride(3)
    code = _function("sd_winograd_weights", weight.dtype)
    code(weight.data_ptr(), result.data_ptr(), inputs, outputs, *strides, upsampled, torch.get_num_threads())
    return result


def convolve(x: Tensor, weights: Tensor, bias: Tensor, upsampled: bool) -> Tensor:
    """x (B, C, H, W) and weights of `lay_out` -> (B, C', H, W), upsampled (B, C', 2H, 2W), in channels_last order.

    Raises RuntimeError if the algorithm is not available, and for weights of other sizes or precision.
    """
    scale = 2 if upsampled else 1
    x = x.contiguous(memory_format=torch.channels_last)
    batch, inputs, height, width = x.shape
    expected = len(bias) // OUTPUTS, 9 if upsampled else 16, inputs, OUTPUTS
    if weights.shape != expected or not x.dtype == weights.dtype == bias.dtype:
        given = f"{list(weights.shape)} in {weights.dtype}, biases in {bias.dtype}"
        raise RuntimeError(f"inputs in {x.dtype} need weights {list(expected)} in the same precision, got {given}")
    result = x.new_empty(batch, scale * height, scale * width, len(bias))
    threads = torch.get_num_threads()
    code = _function("sd_winograd", x.dtype)
    memory = torch.empty(
        threads * KERNEL.library().sd_winograd_memory(inputs, x.element_size()), dtype=torch.uint8, device="cpu"
    )
    sizes = (ctypes.c_long * 6)(batch, scale * height, scale * width, inputs, len(bias), upsampled)
    addresses = [tensor.data_ptr() for tensor in (x, weights, bias, result)]
    code(*addresses, sizes, memory.data_ptr(), threads)
    return result.permute(0, 3, 1, 2)


def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    code = KERNEL.library()
    if code is None:
        raise RuntimeError("Winograd's algorithm was not compiled on this machine")
    return getattr(code, f"{name}_{'float' if dtype == torch.float32 else 'bf16'}")


OPERATOR = Operator("winograd(Tensor x, Tensor weights, Tensor bias, bool upsampled) -> Tensor", convolve)
