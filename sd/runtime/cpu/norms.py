"""Group norms in bf16 with the SiLU behind them, in two readings and one writing of what they are given.

PyTorch's own take a multiple of that, and lose digits where the mean of a group is far from zero. `group_norm.cpp` is
for processors with AVX512-BF16; it is one operator to PyTorch. Elsewhere everything is as ever, and as elsewhere in
this folder the networks do not know.

B batch, C channels, H W height and width.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks import unet
from sd.runtime.cpu.attention import NEEDED, is_supported
from sd.runtime.cpu.native import ADDRESS, LATENTS, NUMBER, Kernel
from sd.runtime.cpu.operators import Operator
from sd.runtime.patching import exchanged

FUNCTIONS = {
    "sd_group_norm_memory": ([NUMBER] * 3, NUMBER),
    "sd_group_norm": ([ADDRESS] * 4 + [NUMBER] * 4 + [ctypes.c_float, ADDRESS, NUMBER], None),
}
KERNEL = Kernel("group_norm", features=lambda: NEEDED, functions=lambda: FUNCTIONS)
Joined = Callable[[nn.GroupNorm, Tensor, bool], Tensor]  # norm, x, whether the result may take the place of x


def joined(x: Tensor, latents: int, on_build: Callable[[], object] = lambda: None) -> Joined:
    """A function for a norm and the SiLU behind it, for networks that compute with tensors like x, without gradients.

    latents   the number of positions in the latents that belong to x
    on_build  called before the kernel is compiled, which is done once on a machine
    """
    if latents < LATENTS or not is_supported(x.device, x.dtype) or torch.is_grad_enabled():
        return one_after_the_other
    return one_after_the_other if KERNEL.library(on_build) is None else by_kernel


def norms_joined(
    network: unet.UNet, x: Tensor, on_build: Callable[[], object] = lambda: None
) -> AbstractContextManager[None]:
    """As long as it lasts, residual blocks of the UNet have such norms, in predictions for x (B, C, H, W)."""
    norm_silu = joined(x, x.shape[-2:].numel(), on_build)
    if norm_silu is one_after_the_other:
        return exchanged({})
    blocks = [module for module in network.modules() if isinstance(module, unet.ResidualBlock)]
    return exchanged({block: _forward(block, norm_silu) for block in blocks})


def _forward(block: unet.ResidualBlock, norm_silu: Joined) -> Callable[[Tensor, Tensor], Tensor]:
    def forward(x: Tensor, time: Tensor) -> Tensor:
        """`sd.networks.unet.ResidualBlock.forward`"""
        h = block.conv1(norm_silu(block.norm1, x, False))
        h = h + block.time_proj(F.silu(time))[:, :, None, None]
        h = block.conv2(norm_silu(block.norm2, h, True))
        return block.skip(x) + h

    return forward


def one_after_the_other(norm: nn.GroupNorm, x: Tensor, in_place: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W), by PyTorch."""
    return F.silu(norm(x), inplace=True)


def by_kernel(norm: nn.GroupNorm, x: Tensor, in_place: bool) -> Tensor:
    """The same by the kernel, where it is for such channels."""
    if norm.num_channels % 16:
        return one_after_the_other(norm, x, in_place)
    x = x.contiguous(memory_format=torch.channels_last)
    out = x if in_place else torch.empty_like(x)
    return OPERATOR.call(x, norm.weight, norm.bias, norm.num_groups, norm.eps, out)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, out: Tensor) -> Tensor:
    """x (B, C, H, W) in channels_last order -> out, which may be x; all bf16.

    Wu & He, "Group Normalization" (2018), eq. 1 and 6. Raises RuntimeError where the kernel is not to be had, and for
    weights of another size or precision.
    """
    code = KERNEL.library()
    if code is None:
        raise RuntimeError("the kernel for group norms was not compiled on this machine")
    batch, channels, height, width = x.shape
    if {weight.shape, bias.shape} != {(channels,)} or {t.dtype for t in (x, weight, bias, out)} != {torch.bfloat16}:
        raise RuntimeError(
            f"{channels} channels in bfloat16 need as many weights in it, got {weight.shape} {weight.dtype}"
        )
    sizes = batch, height * width, channels
    memory = torch.empty(code.sd_group_norm_memory(*sizes), dtype=torch.float32)
    addresses = [tensor.data_ptr() for tensor in (x, out, weight, bias)]
    code.sd_group_norm(*addresses, *sizes, groups, eps, memory.data_ptr(), torch.get_num_threads())
    return out


OPERATOR = Operator(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor(a!) out) -> Tensor(a!)",
    group_norm_silu,
)
