"""Linear layers and convolutions of a UNet in 8 bits, on processors with AVX512-VNNI or AMX: `--precision int8`.

Weights get a scale for each output channel, once. What is multiplied with them gets one scale and one zero for a whole
array in every call; in the hidden values of feed-forwards, which differ most, one scale for each token. oneDNN sums
their products in 32 bits, exactly, and adds the bias; `int8.cpp` rounds what goes in. Which layers are left out was
measured: docs/performance-int8.md.

With whole numbers q and w, and scales s and t, x = s (q - zero) and the weight t w give
x . weight = s t (q . w - zero * sum of w): Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018), eqs. 1 to 7. The last product is added to the bias.

B batch, T tokens, C channels, H W height and width, D width of a token, N numbers of a result.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.attention import GEGLU, SpatialTransformer, TransformerBlock
from sd.networks.unet import Downsample, ResidualBlock, UNet, Upsample
from sd.pipeline.errors import SettingError
from sd.runtime.cpu.native import ADDRESS, AVX512, NUMBER, PAIRS, Kernel, compiler, cpu_flags
from sd.runtime.cpu.operators import Operator
from sd.runtime.cpu.packing import origin
from sd.runtime.cpu.winograd import OUTPUTS, WinogradConvolutions, fits

LINEAR = getattr(torch.ops.onednn, "qlinear_pointwise", None)  # there are builds of PyTorch without oneDNN
CONVOLUTION = getattr(torch.ops.onednn, "qconv_pointwise", None)
SUMS = "avx512_vnni"  # of four products of 8 bits
MIDDLE = 128  # the zero, of 0 to 255, where there is a scale for each token
PART = 128  # output channels whose weights are rounded at a time
TINY = torch.finfo(torch.float32).tiny
TYPICAL = 18, 18  # feature map with its padding
WIDTH = 16  # numbers of channels are multiples of
FUNCTIONS = {
    "sd_int8_round": ([ADDRESS] * 2 + [NUMBER] * 5 + [ADDRESS, NUMBER], None),
    "sd_int8_round_rows": ([ADDRESS] * 4 + [NUMBER] * 3, None),
    "sd_int8_rescale": ([ADDRESS] * 3 + [NUMBER] * 3, None),
    "sd_winograd_memory_int8": ([NUMBER], NUMBER),
    "sd_winograd_weights_int8": ([ADDRESS] * 4 + [NUMBER] * 5 + [ADDRESS, NUMBER], None),
    "sd_winograd_int8": ([ADDRESS] * 8 + [NUMBER], None),
}
KERNEL = Kernel("int8", features=lambda: AVX512 | {PAIRS, SUMS}, functions=lambda: FUNCTIONS)


def problem_of(device: torch.device) -> str | None:
    """Why networks cannot compute in 8 bits on this device; None if they can."""
    if device.type != "cpu":
        return "is for CPUs"
    if not cpu_flags() >= AVX512 | {PAIRS, SUMS}:
        such_as = "such as AMD's Zen 4 or Intel's Sapphire Rapids"
        return f"needs a processor with AVX512-VNNI and AVX512-BF16, {such_as}, and Linux"
    if LINEAR is None or CONVOLUTION is None or not torch.backends.mkldnn.enabled:
        return "needs a build of PyTorch with oneDNN"
    if KERNEL.library() is not None:
        return None
    if KERNEL.problem:
        return f"needs code compiled for this processor, which cannot be kept: {KERNEL.problem.removesuffix('.')}"
    if command := compiler():
        failed = f"{command[0]} failed, or the cache folder cannot be written (XDG_CACHE_HOME names another)"
        return f"needs code compiled for this processor, but {failed}"
    return "needs a C++ compiler, g++ or the one named in CXX"


class Packed(NamedTuple):
    """A weight in 8 bits, or the part of it that belongs to some of the output channels.

    values  in oneDNN's layout, which only oneDNN can read
    scales  (N,) what one step of the values stands for
    sums    (N,) of each output channel's weights, as they are in 8 bits
    """

    values: Tensor
    scales: Tensor
    sums: Tensor

    def how(self, bias: Tensor, *sizes: object, then: str = "none") -> tuple:
        """oneDNN's arguments after the weight; `then` a function that is applied to the sums and the bias."""
        zeros = torch.zeros_like(self.scales, dtype=torch.int32)
        return self.scales, zeros, bias, *sizes, 1.0, 0, torch.bfloat16, then, [], "none"


class Inputs(NamedTuple):
    """Numbers in 8 bits: each stands for scale * (value - zero)."""

    values: Tensor
    scale: float
    zero: int


class Int8Layer:
    """A layer that computes with a copy of its weight in 8 bits, without gradients.

    The weight itself stays as it is in the file. The copy is made again when the weight has changed; changes through
    `.data` are not seen. For inputs in float32, and where gradients are needed, the weight itself is used.
    """

    parts = 1  # products in which the outputs are computed
    waits = False  # until a picture is made: its size decides how the weight is laid out

    def packed(self) -> tuple[Packed, ...]:
        made, (weight, version) = vars(self).get("_packed"), origin(self)
        if made is None or (made[0].data_ptr(), made[1]) != (weight.data_ptr(), version):
            self.use(self.pack(weight))
        return self._packed[2]

    def use(self, packed: tuple[Packed, ...]) -> None:
        self._packed = *origin(self), packed

    def pack(self, weight: Tensor) -> tuple[Packed, ...]:
        parts = [in_8_bits(part) for part in weight.detach().chunk(self.parts)]
        return tuple(Packed(self.laid_out(values, scales), scales, sums) for values, scales, sums in parts)

    def is_exact(self, x: Tensor) -> bool:
        """Whether inputs like x are multiplied with the weight itself."""
        return x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.requires_grad or self.weight.requires_grad

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_packed"}  # copies make their own


class Int8Linear(Int8Layer, nn.Linear):
    def laid_out(self, values: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(values, None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., N)"""
        if self.is_exact(x):
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        inputs = to_8_bits(x)
        results = [self.product(inputs, part) for part in range(self.parts)]
        return (torch.cat(results, -1) if len(results) > 1 else results[0]).unflatten(0, x.shape[:-1])

    def product(self, x: Inputs, part: int = 0, then: str = "none") -> Tensor:
        """(..., D) -> (T, N) of some of the outputs. then: "gelu" is applied to them"""
        packed = self.packed()[part]
        bias = packed.sums * (-x.scale * x.zero)
        if self.bias is not None:
            bias += self.bias.chunk(self.parts)[part]
        return LINEAR(x.values.flatten(0, -2), x.scale, 0, packed.values, *packed.how(bias, then=then))

    def by_token(self, x: Tensor, gate: Tensor) -> Tensor:
        """x (T, D) times the gate -> (T, N), with a scale for each token."""
        (packed,), (values, scales) = self.packed(), round_rows(x, gate)
        result = LINEAR(values, 1.0, 0, packed.values, *packed.how(packed.sums * -MIDDLE))
        run("sd_int8_rescale", result, scales, self.bias.to(torch.float32), *result.shape)
        return result


class Int8Conv2d(Int8Layer, nn.Conv2d):
    @property
    def waits(self) -> bool:
        return fits(self)

    def laid_out(self, values: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.onednn.qconv_prepack(values, scales, 1.0, 0, *self.sizes, [2, self.in_channels, *TYPICAL])

    @property
    def sizes(self) -> tuple:
        return self.stride, (0, 0), self.dilation, self.groups  # inputs have their padding already

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H', W')"""
        if self.is_exact(x):
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias)
        (packed,), inputs = self.packed(), to_8_bits(x.permute(0, 2, 3, 1), self.padding[0])
        bias = torch.add(self.bias, packed.sums, alpha=-inputs.scale * inputs.zero)
        how = packed.values, *packed.how(bias, *self.sizes)
        return CONVOLUTION(inputs.values.permute(0, 3, 1, 2), inputs.scale, 0, *how)


class Int8GEGLU(GEGLU):
    """What its gates let pass gets a scale for each token."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        if self.proj_in.is_exact(x) or self.proj_out.is_exact(x):
            return super().forward(x)
        inputs = to_8_bits(x)
        value, gate = self.proj_in.product(inputs, 0), self.proj_in.product(inputs, 1, "gelu")
        return self.proj_out.by_token(value, gate).unflatten(0, x.shape[:-1])


def require_int8(device: torch.device) -> None:
    """Raises SettingError where networks on that device cannot compute in 8 bits."""
    if problem := problem_of(device):
        raise SettingError("precision", f"int8 {problem}. Leave it out, or choose another.")


def make_int8(unet: UNet) -> dict[str, Int8Layer]:
    """Have a UNet compute in 8 bits from now on, and return the layers that do, by name."""
    found: set[nn.Module] = set()
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            found |= {module.proj_in, module.proj_out}
        elif isinstance(module, TransformerBlock):
            own, text = module.self_attention, module.cross_attention
            found |= {own.q, own.k, own.v, own.out, text.q, text.out}
        elif isinstance(module, GEGLU) and module.proj_out.out_features % WIDTH == 0:
            module.__class__, module.proj_in.parts = Int8GEGLU, 2  # value and gate
            found |= {module.proj_in, module.proj_out}
        elif isinstance(module, ResidualBlock):
            found |= {module.conv1, module.conv2}
        elif isinstance(module, Downsample | Upsample):
            found |= {module.conv}
    for module in found:
        if module.weight.shape[0] % WIDTH == module.weight.shape[1] % WIDTH == 0:
            module.__class__ = Int8Linear if isinstance(module, nn.Linear) else Int8Conv2d
    return {name: module for name, module in unet.named_modules() if isinstance(module, Int8Layer)}


class WinogradIn8Bits(WinogradConvolutions):
    """Winograd's algorithm with factors in 8 bits, which is faster for small feature maps, too."""

    positions = 64

    def forwards(self, x: Tensor, *how: object) -> dict[nn.Module, Callable[..., Tensor]]:
        return super().forwards(x, *how) if x.dtype == torch.bfloat16 else {}

    def lay_out(self, weight: Tensor, dtype: torch.dtype, upsampled: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The weights (N/64, points, C/4, 64, 4), their scales, and what the inputs' zero adds (N/64, points, 64)."""
        weight = weight.to(torch.float32)
        weight = weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()
        outputs, inputs = weight.shape[:2]
        shape = outputs // OUTPUTS, 9 if upsampled else 16
        values = weight.new_empty(*shape, inputs // 4, OUTPUTS, 4, dtype=torch.int8)
        scales, begins = (weight.new_empty(*shape, OUTPUTS, dtype=kind) for kind in (torch.float32, torch.int32))
        memory = weight.new_empty(torch.get_num_threads(), 16, OUTPUTS, inputs)
        sizes = inputs, outputs, weight.stride(1), weight.stride(3), upsampled
        run("sd_winograd_weights_int8", weight, values, scales, begins, *sizes, memory)
        return values, scales, begins

    def compute(self, x: Tensor, weights: tuple[Tensor, Tensor, Tensor], bias: Tensor, upsampled: bool) -> Tensor:
        return WINOGRAD.call(x, *weights, bias, upsampled)


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (N, ...) -> from -127 to 127; the scales (N,) of the output channels; the sums (N,) of scaled weights."""
    parts = []
    for part in weight.split(PART):  # temporary copies stay small
        rows = part.to(torch.float32).flatten(1)
        scales = torch.linalg.vector_norm(rows, torch.inf, 1).div_(127).clamp_min_(TINY)
        rows = (rows / scales[:, None]).round_()
        parts.append((rows.to(torch.int8).view(part.shape), scales, rows.sum(1).mul_(scales)))
    values, scales, sums = map(torch.cat, zip(*parts, strict=True))
    return values, scales, sums


def to_8_bits(x: Tensor, pad: int = 0) -> Inputs:
    """(B, H, W, C) -> (B, H + 2 pad, W + 2 pad, C) with zeros around; with no pad, of any shape."""
    x, how = x.contiguous(), x.new_empty(2, dtype=torch.float32)
    batch, rows, columns = x.shape[:3] if pad else (1, x.shape[:-1].numel(), 1)
    shape = (batch, rows + 2 * pad, columns + 2 * pad, x.shape[-1]) if pad else x.shape
    values = x.new_empty(shape, dtype=torch.uint8)
    run("sd_int8_round", x, values, batch, rows, columns, x.shape[-1], pad, how)
    scale, zero = how.tolist()
    return Inputs(values, scale, int(zero))


def round_rows(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """x times the gate (T, D), both contiguous -> in 8 bits, and the scales (T,) of the rows."""
    values, scales = torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)
    run("sd_int8_round_rows", x, gate, values, scales, *x.shape)
    return values, scales


def winograd(x: Tensor, values: Tensor, scales: Tensor, begins: Tensor, bias: Tensor, upsampled: bool) -> Tensor:
    """`sd.runtime.cpu.winograd.convolve`"""
    x, times = x.contiguous(memory_format=torch.channels_last), 2 if upsampled else 1
    batch, inputs, height, width = x.shape
    result = x.new_empty(batch, times * height, times * width, len(bias))
    memory = code().sd_winograd_memory_int8(inputs) * torch.get_num_threads()
    sizes = torch.tensor([batch, *result.shape[1:3], inputs, len(bias), upsampled], dtype=torch.int64, device="cpu")
    arguments = x, values, scales, begins, bias.to(x.dtype), result, sizes, x.new_empty(memory, dtype=torch.uint8)
    run("sd_winograd_int8", *arguments)
    return result.permute(0, 3, 1, 2)


def run(name: str, *arguments: Tensor | int) -> None:
    """Call a function of the kernel with the addresses of tensors, and with the number of threads."""
    addresses = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
    getattr(code(), name)(*addresses, torch.get_num_threads())


def code() -> ctypes.CDLL:
    library = KERNEL.library()
    if library is None:
        raise RuntimeError("the functions for 8 bits were not compiled on this machine")
    return library


SCHEMA = "winograd_int8(Tensor x, Tensor values, Tensor scales, Tensor begins, Tensor bias, bool upsampled) -> Tensor"
WINOGRAD = Operator(SCHEMA, winograd)
