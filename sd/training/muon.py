"""Muon, an optimiser for weight matrices: each step moves a matrix equally far in every direction that it uses.

A gradient mostly says a few things loudly. AdamW evens out its numbers one by one, Muon its singular values. The small
model's autoencoder gets in 40 steps as far as with AdamW in 160.

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

    Newton-Schulz iteration: x <- (A + B x x^T + C (x x^T)^2) x applies the odd polynomial A s + B s^3 + C s^5 to every
    singular value s. All factors are polynomials in the first x x^T, so they are multiplied before they meet x, by
    products of the short side only: a third of the time.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.to(torch.float64 if matrix.is_cuda else torch.float32)  # for squares of small values, TF32 is too coarse
    x = x / (x.norm() + 1e-7)  # so that no singular value is above 1
    square = x @ x.T
    total = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        factor = A * identity + B * square + C * square @ square
        total, square = factor @ total, factor @ square @ factor
    x = (total @ x).to(matrix.dtype)
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """For matrices and kernels, whose rows are output channels; everything else is left to AdamW.

    The updates' root mean square is 0.2, about that of AdamW, so both share a learning rate and a weight decay: Liu et
    al., "Muon is Scalable for LLM Training" (2025), eq. 4.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                state = self.state[value]
                if not state:
                    state["momentum"] = torch.zeros_like(value)
                state["momentum"].lerp_(value.grad, 1 - group["momentum"])
                ahead = value.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                update = orthogonalise(ahead.flatten(1))
                value.mul_(1 - group["lr"] * group["weight_decay"])
                value.sub_(update.reshape(value.shape), alpha=0.2 * math.sqrt(max(update.shape)) * group["lr"])


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether Muon is for this parameter: not for vectors, nor for tables of embeddings."""
    return value.ndim > 1 and not name.endswith("embedding.weight")
