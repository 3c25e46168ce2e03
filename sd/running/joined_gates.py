"""Gated feed-forwards in bf16 whose GELU and gate are applied while a product is written.

oneDNN, which multiplies matrices in bf16 for PyTorch on CPUs, can add a bias, take the GELU and multiply with another
array before it rounds a product. PyTorch copies the bias to each row first, and reads and writes all hidden values
again for the GELU and for the gate: in v1 at 512x512, 42 MB in each of the largest layers. As elsewhere in this folder,
the network does not know.

B batch, T tokens, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from sd.attention import GEGLU
from sd.running.exchange import exchanged
from sd.running.packing import can_pack

LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # there are builds of PyTorch without oneDNN


def gates_joined(network: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    """As long as it lasts, the network's gates are joined to its products, in predictions for x, without gradients.

    Only in bf16 and where oneDNN has it; elsewhere nothing changes.
    """
    if LINEAR is None or x.dtype != torch.bfloat16 or not can_pack(x.device, x.dtype) or torch.is_grad_enabled():
        return exchanged({})
    return exchanged({module: _forward(module) for module in network.modules() if isinstance(module, GEGLU)})


def _forward(layer: GEGLU) -> Callable[[Tensor], Tensor]:
    """`GEGLU.forward`, the gate first: Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6."""

    def forward(x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        (weight, gate_weight), (bias, gate_bias) = layer.proj_in.weight.chunk(2), layer.proj_in.bias.chunk(2)
        gate = LINEAR(x, gate_weight, gate_bias, "gelu", [], "none")  # the exact one, not the one by tanh
        return layer.proj_out(LINEAR.binary(x, gate, weight, bias, "mul"))

    return forward
