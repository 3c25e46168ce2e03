"""Attention in bf16 on processors with AMX or AVX512-BF16, by `attention.cpp`, if there is a compiler.

PyTorch's kernel takes more than a third of a step of v1 at 512x512, nearly all of it for the 4,096 tokens in heads 40
wide. This one takes less than half of that time; docs/performance.md has the figures.

B batch, T tokens, S tokens attended to, D width of all heads.
"""

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.networks.attention import Attention
from sd.runtime.cpu.native import ADDRESS, AVX512, NUMBER, PAIRS, TILES, Kernel, cpu_flags
from sd.runtime.cpu.operators import Operator
from sd.runtime.device import LATENTS
from sd.runtime.patching import patched

WIDEST = 512  # head, in the VAE; the kernel needs memory for whole rows
NEEDED = AVX512 | {PAIRS}
FUNCTIONS = {
    "sd_attention_memory": ([NUMBER] * 2, NUMBER),
    "sd_attention": (
        [ADDRESS] * 4 + [NUMBER] * 5 + [ctypes.POINTER(NUMBER), ctypes.c_float, ADDRESS, NUMBER],
        None,
    ),
}
KERNEL = Kernel(
    "attention",
    features=lambda: NEEDED | TILES if cpu_flags() >= TILES else NEEDED,
    functions=lambda: FUNCTIONS,
    usable=lambda code: code.sd_attention_permitted(),  # the system has to let a process use tiles
)


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine can run the kernel for this device and precision, if there is a compiler."""
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_flags() >= NEEDED


def attention_applied(
    network: nn.Module, x: Tensor, on_build: Callable[[], object] = lambda: None, latents: int | None = None
) -> AbstractContextManager[None]:
    """Within this context, the network uses the kernel, for inputs like x (B, C, H, W), without gradients.

    on_build  called before the kernel is compiled, once per machine
    latents   the number of positions in the latents that belong to x, if x is not latents
    """
    latents = x.shape[-2:].numel() if latents is None else latents
    if latents < LATENTS or not is_supported(x.device, x.dtype) or torch.is_grad_enabled():
        return patched({})
    if KERNEL.library(on_build) is None:
        return patched({})
    layers = (module for module in network.modules() if isinstance(module, Attention))
    return patched({layer: _forward(layer) for layer in layers if head_fits(layer.q.out_features // layer.heads)})


def head_fits(width: int) -> bool:
    return width % 2 == 0 and width <= WIDEST


def _forward(layer: Attention) -> Callable[..., Tensor]:
    plain, operator = layer.forward, OPERATOR.call

    def forward(x: Tensor, context: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """`Attention.forward`"""
        if causal:
            return plain(x, context, causal=True)
        context = x if context is None else context
        return layer.out(operator(layer.q(x), layer.k(context), layer.v(context), layer.heads))

    return forward


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q (B, T, D), k and v (B, S, D), all bf16 -> (B, T, D).

    Vaswani et al., "Attention Is All You Need" (2017), eq. 1.
    """
    code = KERNEL.library()
    (batch, queries, width), keys = q.shape, k.shape[1]
    if code is None or not keys or not head_fits(width // heads):
        return plain_attention(q, k, v, heads)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(q.shape)
    head, threads = width // heads, torch.get_num_threads()
    memory = torch.empty(threads * code.sd_attention_memory(keys, head), dtype=torch.uint8, device="cpu")
    strides = (ctypes.c_long * 8)(*(stride for t in (q, k, v, out) for stride in t.stride()[:2]))
    addresses = [t.data_ptr() for t in (q, k, v, out)]
    sizes = batch, heads, queries, keys, head
    code.sd_attention(*addresses, *sizes, strides, 1 / math.sqrt(head), memory.data_ptr(), threads)
    return out


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same by PyTorch."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # -> (B, heads, T, D/heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATOR = Operator("attention(Tensor q, Tensor k, Tensor v, int heads) -> Tensor", attention)
