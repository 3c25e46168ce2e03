"""Muon, an optimiser for weight matrices: each step moves a matrix equally far in every direction that it uses.

A gradient mostly says a few things loudly. AdamW evens out its numbers one by one, Muon its singular values: small
networks learn from about half as many pictures.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial; from Jordan et al., who tuned it to converge fast, not exactly
ITERATIONS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about 1: between 0.7 and 1.2.

    matrix   (rows, columns)
    returns  the same

    Newton-Schulz iteration. It applies the odd polynomial A x + B x^3 + C x^5 to every singular value x, which needs
    products of matrices only.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)  # so that no singular value is above 1
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = A * x + (B * square + C * square @ square) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """For matrices and kernels, whose rows are output channels; everything else is left to AdamW.

    The updates' root mean square is 0.2, about that of AdamW, so both share a learning rate and a weight decay: Liu et
    al., "Muon is Scalable for LLM Training" (2025), eq. 4.

    half  orthogonalise in bf16, for devices that are fast at it; the weights stay as they are
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        half: bool = False,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "half": half})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                state = self.state[value]
                if not state:
                    state["momentum"] = torch.zeros_like(value)
                state["momentum"].lerp_(value.grad, 1 - group["momentum"])
                ahead = value.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                update = orthogonalise(ahead.flatten(1).to(torch.bfloat16 if group["half"] else ahead.dtype))
                value.mul_(1 - group["lr"] * group["weight_decay"])
                value.sub_(update.reshape(value.shape), alpha=0.2 * math.sqrt(max(update.shape)) * group["lr"])


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether Muon is for this parameter: not for vectors, nor for tables of embeddings."""
    return value.ndim > 1 and not name.endswith("embedding.weight")
