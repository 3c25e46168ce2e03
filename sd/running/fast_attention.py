"""Attention in bf16 on processors with AMX or AVX512-BF16, by a kernel of ours where there is a compiler for it.

PyTorch's own kernel takes more than a third of a step of v1 at 512x512, nearly all of it where there are 4,096 tokens
in heads 40 wide. `attention.cpp` takes less than half of that time; docs/performance.md has the figures. It is one
operator to PyTorch, which its compiler can call, too. Elsewhere everything is as ever, and as ever the network does not
know.

B batch, T tokens, S tokens attended to, D width of all heads.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import Attention
from sd.running.exchange import exchanged
from sd.running.native import cpu_flags, library

POSITIONS = 1024  # of the latents, 256x256 pixels: for smaller pictures it would hardly be noticed
WIDEST = 256  # head; the kernel needs memory for whole rows, and PyTorch's is as fast there
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
TILES = {"amx_tile", "amx_bf16"}  # multiply faster, where they are there
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp"]
SCHEMA = "attention(Tensor q, Tensor k, Tensor v, int heads) -> Tensor"


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is for such networks on this machine, if there is a compiler."""
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_flags() >= NEEDED


def attention_applied(
    network: nn.Module, x: Tensor, on_build: Callable[[], object] = lambda: None
) -> AbstractContextManager[None]:
    """As long as it lasts, the network attends by the kernel, in predictions for x (B, C, H, W), without gradients.

    on_build  called before the kernel is compiled, which is done once on a machine
    """
    return exchanged(attending(network, x, on_build))


def attending(
    network: nn.Module, x: Tensor, on_build: Callable[[], object] = lambda: None
) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forward functions for its attention layers; none where the kernel is not to be had."""
    if x.shape[-2:].numel() < POSITIONS or not is_supported(x.device, x.dtype) or torch.is_grad_enabled():
        return {}
    if kernel(on_build) is None:
        return {}
    layers = (module for module in network.modules() if isinstance(module, Attention))
    return {layer: _forward(layer) for layer in layers if head_fits(layer.q.out_features // layer.heads)}


def head_fits(width: int) -> bool:
    return width % 2 == 0 and width <= WIDEST


def _forward(layer: Attention) -> Callable[..., Tensor]:
    plain, operator = layer.forward, registered()[1]

    def forward(x: Tensor, context: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """`Attention.forward`"""
        if causal:
            return plain(x, context, causal=True)
        context = x if context is None else context
        return layer.out(operator(layer.q(x), layer.k(context), layer.v(context), layer.heads))

    return forward


@functools.cache
def registered() -> tuple[torch.library.Library, Callable[..., Tensor]]:
    """The operator, and what it ends with."""
    library = torch.library.Library("sd_zoo", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("attention", attention, "CPU")
    torch.library.register_fake("sd_zoo::attention", lambda q, k, v, heads: q.new_empty(q.shape), lib=library)
    return library, torch.ops.sd_zoo.attention.default


def is_operator(function: Callable) -> bool:
    """Whether a function that somebody saw called is the operator, which is not there before it is needed."""
    return registered.cache_info().currsize > 0 and function is registered()[1]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q (B, T, D), k and v (B, S, D), all bf16 -> (B, T, D).

    Vaswani et al., "Attention Is All You Need" (2017), eq. 1.
    """
    code = kernel()
    (batch, queries, width), keys = q.shape, k.shape[1]
    if code is None or not keys or not head_fits(width // heads):
        return plain_attention(q, k, v, heads)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(q.shape)
    head, threads = width // heads, torch.get_num_threads()
    memory = torch.empty(threads * code.sd_attention_memory(keys, head), dtype=torch.uint8)
    strides = (ctypes.c_long * 8)(*(stride for t in (q, k, v, out) for stride in t.stride()[:2]))
    addresses = [t.data_ptr() for t in (q, k, v, out)]
    sizes = batch, heads, queries, keys, head
    code.sd_attention(*addresses, *sizes, strides, 1 / math.sqrt(head), memory.data_ptr(), threads)
    return out


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same by PyTorch."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # -> (B, heads, T, D/heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


_tried: dict[str, ctypes.CDLL | None] = {}


def kernel(on_build: Callable[[], object] = lambda: None) -> ctypes.CDLL | None:
    """The compiled kernel, or None; what was found first stays for this process."""
    if "kernel" not in _tried:
        known = NEEDED | TILES if cpu_flags() >= TILES else NEEDED
        flags = [f"-m{name.replace('_', '-').replace('avx512-', 'avx512')}" for name in sorted(known)]
        _tried["kernel"] = _checked(library(Path(__file__).with_name("attention.cpp"), [*FLAGS, *flags], on_build))
    return _tried["kernel"]


def _checked(code: ctypes.CDLL | None) -> ctypes.CDLL | None:
    """A library that may use tiles and has the functions."""
    try:
        if code is None or not code.sd_attention_permitted():
            return None
        code.sd_attention_memory.argtypes, code.sd_attention_memory.restype = [ctypes.c_long] * 2, ctypes.c_long
        code.sd_attention.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 5
        code.sd_attention.argtypes += [ctypes.POINTER(ctypes.c_long), ctypes.c_float, ctypes.c_void_p, ctypes.c_long]
        code.sd_attention.restype = None
    except AttributeError:
        return None
    return code
