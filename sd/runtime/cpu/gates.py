"""Gated feed-forwards in bf16 that apply GELU and gate within the matrix products.

oneDNN, which multiplies matrices in bf16 for PyTorch on CPUs, can add a bias, apply GELU and multiply with another
array before it rounds a product. PyTorch instead copies the bias to each row, and reads and writes all hidden values
again for the GELU and for the gate: in v1 at 512x512, 42 MB in each of the largest layers.

B batch, T tokens, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from sd.networks.attention import GEGLU
from sd.runtime.cpu.operators import Operator
from sd.runtime.patching import patched

LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # there are builds of PyTorch without oneDNN


def gates_joined(network: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    """Within this context, the network's gates are fused, for inputs like x in bf16, if oneDNN supports it."""
    if not is_supported(x.device, x.dtype) or torch.is_grad_enabled():
        return patched({})
    return patched({module: _forward(module) for module in network.modules() if type(module) is GEGLU})


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has such products here: in bf16, for processors with AVX-512."""
    if LINEAR is None or device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.enabled:
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _forward(layer: GEGLU) -> Callable[[Tensor], Tensor]:
    operator = OPERATOR.call
    return lambda x: layer.proj_out(operator(x, layer.proj_in.weight, layer.proj_in.bias))


def gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, D), weight (2 D', D), bias (2 D'), whose second halves are the gate's -> (B, T, D').

    Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6, without the last product.
    """
    (weight, gate_weight), (bias, gate_bias) = weight.chunk(2), bias.chunk(2)
    gate = LINEAR(x, gate_weight, gate_bias, "gelu", [], "none")  # the exact one, not the one by tanh
    return LINEAR.binary(x, gate, weight, bias, "mul")


OPERATOR = Operator("gated(Tensor x, Tensor weight, Tensor bias) -> Tensor", gated)
